"""`astrai-serve` before it serves: options, folders, ports. Each mistake is one line."""

import json
import shutil
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

from astrai_core.model import AutoModel, ModelConfig
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.cli import ServeOptions, main

FIELDS: Any = {
    "vocab_size": 300,
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "dim_ffn": 32,
    "max_len": 64,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    AutoModel.save_pretrained(AutoModel.from_config(ModelConfig(**FIELDS)), folder)
    AutoTokenizer.train(["hello 你好"] * 9, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A whole model folder, for a test to break."""
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def fail(capsys):
    """Run the command, which must fail, and return its status and its one line."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("astrai-serve: ")
        return caught.value.code, lines[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--model is required"]),
        (["--modle", "x"], ["--modle", "--model?"]),
        (["--model", "x", "--port", "http"], ["--port", "whole number", "http"]),
        (["--model", "x", "--port", "99999"], ["--port", "65535", "99999"]),
        (["--model", "x", "--dtype", "int3"], ["--dtype", "bfloat16", "int3"]),
        (["--model", "x", "--weights", "int3"], ["--weights", "w8a8", "int3"]),
        (["--model", "x", "--weights", "bf16", "--dtype", "float32"], ["bf16", "contradict"]),
        (["--model", "x", "--page-size", "0"], ["page_size", "positive", "0"]),
        (["--model", "x", "--num-threads", "0"], ["num_threads", "positive", "0"]),
        (["--model", "x", "--num-threads", "two"], ["--num_threads", "whole number", "two"]),
        (["--model", "x", "--max-step-tokens", "4"], ["max_running_tasks 32", "max_step_tokens"]),
        (["x"], ["x is not an option"]),
        (["--model"], ["--model", "needs a value"]),
    ],
)
def test_a_wrong_option_names_itself_and_the_way_out(fail, arguments, words):
    status, line = fail(*arguments)
    assert status == 2
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, ["has no config.json"]),
        ("config.json", b"{", ["config.json", "not readable JSON"]),
        ("config.json", b"[]", ["config.json", "JSON object"]),
        ("config.json", b'{"n_head": 2}', ["'n_head'", "did you mean n_heads?"]),
        ("config.json", b'{"model_type": "gpt2"}', ["'gpt2'", "qwen3"]),
        ("config.json", b'{"dim": 15, "n_heads": 2}', ["dim 15", "n_heads 2"]),
        ("tokenizer.json", None, ["has no tokenizer.json", "--tokenizer"]),
        ("tokenizer.json", b"{", ["tokenizer.json", "not a tokenizer file"]),
        ("tokenizer_config.json", b"{", ["tokenizer_config.json", "not JSON"]),
        ("generation_config.json", b"{", ["generation_config.json", "not JSON"]),
        ("generation_config.json", b'{"top_p": 7}', ["generation_config.json", "top_p", "7"]),
        ("model.safetensors", None, ["has no model.safetensors"]),
        ("model.safetensors", b"", ["model.safetensors", "truncated"]),
        ("model.safetensors", b"PK\x03\x04 no tensors here", ["model.safetensors", "truncated"]),
    ],
)
def test_a_broken_folder_names_the_file(fail, folder, file, content, words):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    status, line = fail("--model", folder, "--port", 0)
    assert status == 1
    assert all(word in line for word in words), line


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_weight_file_is_never_served(fail, folder, share):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    status, line = fail("--model", folder, "--port", 0)
    assert status == 1
    assert "model.safetensors is truncated" in line


def test_an_index_without_its_shard_names_the_shard(fail, folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in fail("--model", folder, "--port", 0)[1]


def test_weights_of_another_shape_name_the_tensor(fail, folder):
    (folder / "config.json").write_text(json.dumps(FIELDS | {"dim_ffn": 48}))
    line = fail("--model", folder, "--port", 0)[1]
    assert "mlp" in line
    assert "(16, 48)" in line


def test_a_tokenizer_of_another_model_is_refused(fail, folder):
    (folder / "config.json").write_text(json.dumps(FIELDS | {"vocab_size": 99}))
    line = fail("--model", folder, "--port", 0, "--random-weights")[1]
    assert f"{AutoTokenizer.from_pretrained(folder).vocab_size} tokens" in line
    assert "vocab_size of 99" in line


def test_a_port_in_use_is_said_in_one_line(fail, whole):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, line = fail("--model", whole, "--port", port)
    assert status == 1
    assert f"port {port} on 127.0.0.1 is in use" in line
    assert "--port" in line


def test_places_that_do_not_exist_are_named(fail, whole, tmp_path):
    assert "does not exist" in fail("--model", tmp_path / "none")[1]
    assert "is a file" in fail("--model", whole / "config.json")[1]
    assert "nowhere.invalid" in fail("--model", whole, "--host", "nowhere.invalid")[1]
    assert "--api_key_file" in fail("--model", whole, "--api-key-file", tmp_path / "none")[1]
    (tmp_path / "keys").write_text("# none yet\n\n")
    assert "holds no key" in fail("--model", whole, "--api-key-file", tmp_path / "keys")[1]


def test_help_and_mistakes_wait_for_no_torch(tmp_path):
    script = (
        "import sys; from astrai_serve.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('heavy', *{'torch', 'fastapi', 'tokenizers'} & sys.modules.keys())"
    )
    for arguments in (["--help"], ["--modle", "x"], ["--model", str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "heavy", done
        assert "Traceback" not in done.stderr


def test_help_tells_every_option_in_words(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    for words in ("--random_weights", "--kv_cache_gb", "Tokens in a page", "Ctrl-C ends"):
        assert words in shown


def test_a_checkpoint_has_the_name_of_its_run_and_any_other_folder_its_own(tmp_path):
    step = tmp_path / "sft" / "checkpoints" / "step-00000060"
    step.mkdir(parents=True)
    (step.parent / "last").symlink_to(step.name)
    assert ServeOptions(model=step.parent / "last").name == "sft"
    assert ServeOptions(model=step).name == "sft"
    assert ServeOptions(model=tmp_path / "sft").name == "sft"
    assert ServeOptions(model=tmp_path / "base", adapter=step).name == "sft"
    assert ServeOptions(model=step, model_name="mine").name == "mine"


def test_random_weights_need_no_weight_file(folder):
    from astrai_serve.model_source import ModelSource

    (folder / "model.safetensors").unlink()
    source = ModelSource.find(folder, "auto", is_random=True)
    model = source.load()
    assert source.num_parameters == sum(p.numel() for p in model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model(torch.tensor([[1, 2]]))["logits"].shape == (1, 2, 300)
