"""What a user gets wrong: one clear line, a status that is not 0, and nothing lost."""

import json
import resource
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

from astrai_core.model import AutoModel, ModelConfig
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.cli import main
from astrai_train.data.prepare import prepare

PROGRAM = Path(sysconfig.get_path("scripts")) / "astrai-train"
TEXTS = [f"{a} plus {b} is {a + b}. 你好，世界！" for a in range(9) for b in range(9)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Two tokenizers and a data file of the first, made once."""
    folder = tmp_path_factory.mktemp("bad-input")
    AutoTokenizer.train(TEXTS, 290).save_pretrained(folder / "tokenizer")
    AutoTokenizer.train([text[::-1] for text in TEXTS], 280).save_pretrained(folder / "other")
    records = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "text.jsonl").write_text(records, encoding="utf-8")
    prepare(
        [folder / "text.jsonl"],
        folder / "text.h5",
        stage="seq",
        tokenizer=folder / "tokenizer",
        workers=1,
    )
    return folder


@pytest.fixture
def config(prepared, tmp_path) -> Path:
    """A run that would work."""
    content = {
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "accelerator": "cpu",
            "max_steps": 2,
            "enable_progress_bar": False,
        },
        "checkpoint": {"every_n_steps": 1},
        "model": {
            "class_path": "SEQModule",
            "init_args": {
                "model": {"vocab_size": 300, "dim": 16, "n_layers": 1, "dim_ffn": 32, "n_heads": 2},
                "compile": False,
                "schedule": {"warmup_steps": 1},
            },
        },
        "data": {
            "class_path": "TokenDataModule",
            "init_args": {
                "tokenizer": str(prepared / "tokenizer"),
                "train": str(prepared / "text.h5"),
                "window_size": 32,
                "batch_size": 2,
            },
        },
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def refusal(capsys, *arguments: str | Path) -> tuple[int, str]:
    """Run a command that must fail, and return its status and its one line."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("astrai-train: ")
    assert isinstance(end.value.code, int)
    return end.value.code, lines[0].removeprefix("astrai-train: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fti"], ["fti is not a command", "did you mean fit?"]),
        (["fit", "--trainr.max_steps", "3"], ["--trainr.max_steps", "did you mean --trainer"]),
        (["fit", "--config", "nowhere.yaml"], ["nowhere.yaml does not exist"]),
        (["fit", "--config"], ["--config needs a file"]),
    ],
)
def test_a_mistake_is_answered_before_anything_is_loaded(capsys, arguments, words):
    status, line = refusal(capsys, *arguments)
    assert status == 2
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: {max_steps: [", "is not YAML"),
        ("- trainer", "is not a mapping"),
        ("trainr: {max_steps: 3}", "unknown section trainr; did you mean trainer?"),
    ],
)
def test_a_broken_configuration_is_named(capsys, tmp_path, text, words):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    status, line = refusal(capsys, "fit", "--config", file)
    assert status == 2
    assert words in line
    assert str(file) in line


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--trainer.max_step", "3", ["unknown option --trainer.max_step"]),
        ("--trainer.max_steps", "many", ["--trainer.max_steps must be a whole number, not many"]),
        ("--trainer.precision", "fp3", ["--trainer.precision must be", "bf16-mixed", "not fp3"]),
        ("--model.optimizer.lr", "fast", ["lr must be a number, not fast"]),
        ("--model.model.dimm", "3", ["dimm is not an option of ModelConfig"]),
        ("--model.model.dim", "-1", ["dim must be a positive integer, not -1"]),
        ("--model.model.n_heads", "3", ["dim 16 is not a multiple of n_heads 3"]),
        ("--model.init_from", "runs/x", ["model and init_from", "contradict each other"]),
        ("--model", "SEQModul", ["there is no class SEQModul"]),
        ("--checkpoint.keep", "0", ["checkpoint.keep must be at least 1, not 0"]),
        ("--seed_everything", "true", ["seed_everything must be a whole number"]),
        ("--trainer.strategy", "ddp_spawn", ["trainer.strategy ddp_spawn", "set", "to ddp"]),
        ("--trainer.strategy", "ddp_fork", ["trainer.strategy ddp_fork", "set", "to ddp"]),
    ],
)
def test_an_option_that_cannot_be_is_named(capsys, config, option, value, words):
    status, line = refusal(capsys, "fit", "--config", config, option, value)
    assert status == 2
    assert all(word in line for word in words), line
    assert len(line) < 400


def test_data_of_another_tokenizer_is_refused(capsys, config, prepared):
    option = ("--data.init_args.tokenizer", prepared / "other")
    status, line = refusal(capsys, "fit", "--config", config, *option)
    assert status == 1
    assert "text.h5 was prepared with another tokenizer" in line


def test_a_corrupt_data_file_is_named(capsys, config, prepared, tmp_path):
    broken = tmp_path / "broken.h5"
    content = (prepared / "text.h5").read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    status, line = refusal(capsys, "fit", "--config", config, "--data.init_args.train", broken)
    assert status == 1
    assert "broken.h5 is damaged" in line


def test_a_missing_data_file_is_named(capsys, config):
    status, line = refusal(capsys, "fit", "--config", config, "--data.init_args.train", "no.h5")
    assert status == 1
    assert "no.h5 does not exist" in line


def test_a_checkpoint_that_is_none_is_named(capsys, config, tmp_path):
    status, line = refusal(capsys, "fit", "--config", config, "--ckpt_path", tmp_path)
    assert status == 1
    assert "has no config.json" in line


def test_weights_alone_are_no_run_to_go_on_with(capsys, config, prepared, tmp_path):
    shape = ModelConfig(vocab_size=300, dim=16, n_layers=1, dim_ffn=32, n_heads=2)
    AutoModel.save_pretrained(AutoModel.from_config(shape), tmp_path / "model")
    option = ("--ckpt_path", tmp_path / "model")
    status, line = refusal(capsys, "fit", "--config", config, *option)
    assert status == 1
    assert "use --model.init_args.init_from" in line
    options = ("--data.init_args.val", str(prepared / "text.h5"))
    main(["validate", "--config", str(config), "--ckpt_path", str(tmp_path / "model"), *options])
    assert "weights of" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_checkpoint_whole(config, tmp_path):
    main(["fit", "--config", str(config)])
    checkpoints = tmp_path / "run" / "checkpoints"
    before = {file: file.read_bytes() for file in checkpoints.rglob("*") if file.is_file()}
    largest = max(map(len, before.values()))

    full = subprocess.run(
        [PROGRAM, "fit", "--config", config, "--trainer.max_steps", "5"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, -1)),
        capture_output=True,
        text=True,
        timeout=240,
    )

    (line,) = full.stderr.splitlines()
    assert full.returncode == 1
    assert "cannot write the checkpoint" in line
    assert "step-00000002 is whole: free some space and run the same command again" in line
    assert {file: file.read_bytes() for file in checkpoints.rglob("*") if file.is_file()} == before
    main(["fit", "--config", str(config), "--trainer.max_steps", "3"])
    assert (checkpoints / "last").resolve().name == "step-00000003"


@pytest.mark.slow
def test_a_full_file_system_is_no_different(config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    try:
        command = [PROGRAM, "fit", "--config", config, "--trainer.max_steps", "50"]
        options = ["--trainer.default_root_dir", disk / "run", "--checkpoint.keep", "50"]
        full = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
        (line,) = full.stderr.splitlines()
        assert full.returncode == 1
        assert "No space left on device" in line
        root = disk / "run" / "checkpoints"
        assert not list(root.glob(".tmp-*"))
        shutil.copytree((root / "last").resolve(), tmp_path / "last")
        main(["validate", "--config", str(config), "--ckpt_path", str(tmp_path / "last")])
    finally:
        subprocess.run(["umount", str(disk)], check=True)
