import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from astrai_core.cli import main
from astrai_core.model import AutoModel, ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=100, dim=32, n_layers=2, dim_ffn=48, n_heads=4, n_kv_heads=2, max_len=512
)


@pytest.fixture
def folder(tmp_path):
    """A model folder without a tokenizer."""
    AutoModel.save_pretrained(Transformer(CONFIG), tmp_path / "m")
    return tmp_path / "m"


def run(capsys, *arguments):
    """Exit code (None at a plain return), output and error text."""
    code = None
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_counts_are_those_of_arithmetic(capsys, folder):
    code, out, _ = run(capsys, "info", folder)
    assert code is None
    parts = {name: int(n.replace(",", "")) for name, n in re.findall(r" {4}(\S+) +([\d,]+) ", out)}
    attention = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32)
    norms = 32 + 2 * (2 * 32 + 2 * 8)
    assert parts["embedding"] == 100 * 32
    assert parts["attention"] == attention
    assert parts["feed-forward"] == 2 * 3 * 32 * 48
    assert parts["norms"] == norms
    total = 100 * 32 + attention + norms + 2 * 3 * 32 * 48
    assert f"parameters   {total:,}" in out
    matrices = attention + 2 * 3 * 32 * 48
    channels = 2 * (32 + 2 * 16 + 32 + 48 + 48 + 32)
    table = 100 * 32 + 100 * 4  # int8 either way, with a scale a row
    int8 = table + matrices + channels * 4 + norms * 4
    down = 2 * 32 * 48  # its 48 inputs are in groups of 16, the 32 of the others in one of 32
    int4 = table + matrices / 2 + ((matrices - down) / 32 + down / 16) * 4 + norms * 4
    cells = " kB +".join(f"{size / 1e3:.1f}" for size in (total * 4, total * 2, int8, int4))
    assert re.search(rf"weights +{cells} kB\n", out)
    # a token: 2 layers x (2 key + 2 value heads) x 8 numbers
    assert re.search(r" 1 token +256 B +128 B\n", out)
    assert re.search(rf" 512 tokens +{512 * 256 / 1e3:.1f} kB +{512 * 128 / 1e3:.1f} kB\n", out)
    assert "tokenizer    none" in out


def test_json_has_the_same_figures_for_programs(capsys, folder):
    _, out, _ = run(capsys, "info", folder, "--json")
    info = json.loads(out)
    assert info["total"] == info["activated"] == sum(info["parameters"].values())
    assert ModelConfig.from_dict(info["architecture"]) == CONFIG
    assert info["stored"] == {"F32": info["total"]}
    assert info["weight_bytes"]["float32"] == info["total"] * 4
    assert info["cache_bytes"]["bfloat16"]["512"] == 512 * 128
    assert info["tokenizer"] is None


def test_experts_count_apart_and_only_the_chosen_ones_are_activated(capsys, tmp_path):
    experts = {"ffn_type": "moe", "n_routed_experts": 6, "n_activated_experts": 2}
    more = {"dim_ffn_expert": 8, "n_shared_experts": 1, "first_k_dense": 1}
    config = ModelConfig.from_dict({**CONFIG.to_dict(), **experts, **more})
    AutoModel.save_pretrained(Transformer(config), tmp_path / "m")
    _, out, _ = run(capsys, "info", tmp_path / "m", "--json")
    info = json.loads(out)
    one = 3 * 32 * 8  # of one block, since the first is dense
    assert info["parameters"]["experts"] == 6 * one
    assert info["parameters"]["shared experts"] == one
    assert info["parameters"]["router"] == 6 * 32
    assert info["total"] - info["activated"] == 4 * one


def test_a_folder_goes_out_through_the_command(capsys, folder, tmp_path):
    code, out, _ = run(capsys, "export", folder, "--format", "hf", "--out", tmp_path / "out")
    assert code is None
    assert out == f"{tmp_path / 'out'}: a qwen3 folder without a tokenizer, since there is none\n"
    _, out, _ = run(capsys, "info", tmp_path / "out")
    assert "family       qwen3" in out
    both = ("--format", "hf", "--out", tmp_path / "o", "--type", "f16")
    code, _, err = run(capsys, "export", folder, *both)
    assert (code, err) == (2, "astrai-model: --type is for --format gguf; leave it out\n")


def test_a_damaged_folder_is_one_line(capsys, folder):
    content = load_file(folder / "model.safetensors")
    save_file(content | {"model.norm.weight": torch.ones(31)}, folder / "model.safetensors")
    code, out, err = run(capsys, "info", folder)
    assert (code, out) == (1, "")
    assert err.endswith(
        "do not fit config.json, first at norm.weight (has 31 numbers, should have 32)\n"
    )
    os.truncate(folder / "model.safetensors", 50)
    code, out, err = run(capsys, "info", folder)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "model.safetensors is truncated" in err


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["info"], 2, "which folder?"),
        (["inspect", "x"], 2, "inspect is not a command; there are info"),
        (["info", "--json"], 2, "which folder? astrai-model info DIR"),
        (["quantize", "--out", "small", "nowhere"], 1, "nowhere does not exist"),
        (["info", "x", "--jsn"], 2, "unknown option --jsn; did you mean --json?"),
        (["info", "a", "b"], 2, "b is not an option"),
        (
            ["export", "x", "--format", "gguf", "--type", "Q8_0", "--out", "y"],
            2,
            "--type must be f32 or f16 or bf16 or q8_0 or null, not Q8_0",
        ),
        (["info", "/nowhere"], 1, "/nowhere does not exist; pass a model folder on this disk"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, code, named):
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("astrai-model: ")
    assert named in err


def test_help_is_no_error(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: astrai-model COMMAND DIR")
    code, out, err = run(capsys, "info", "--help")
    assert (code, err) == (0, "")
    assert re.search(r"^usage: astrai-model info .*DIR$", out, re.MULTILINE)
    assert "--folder" not in out
