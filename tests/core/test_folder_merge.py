"""`astrai-model merge`, as it is called."""

import pytest
import torch

from astrai_core.cli import main
from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.model.adapter import adapt
from astrai_core.model.lora import LoRAConfig, lora_layers
from astrai_core.tokenizer import AutoTokenizer

SHAPE = ModelConfig(vocab_size=300, dim=16, n_layers=1, dim_ffn=24, n_heads=2)
IDS = torch.arange(8).view(1, 8)


@pytest.fixture
def world(tmp_path):
    """A base with a tokenizer, and an adapter over it."""
    torch.manual_seed(0)
    model = Transformer(SHAPE).eval()
    AutoModel.save_pretrained(model, tmp_path / "base")
    AutoTokenizer.train(["one two"], 260).save_pretrained(tmp_path / "base")
    adapt(model, LoRAConfig(rank=2), tmp_path / "base")
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    AutoModel.save_pretrained(model, tmp_path / "adapter")
    return tmp_path


def test_a_merged_folder_needs_neither_base_nor_adapter(world, capsys):
    expected = AutoModel.from_pretrained(world / "adapter")(IDS)["logits"]
    main(["merge", str(world / "adapter"), "--out", str(world / "merged")])
    assert "merged into" in capsys.readouterr().out
    (world / "base").rename(world / "elsewhere")
    merged = AutoModel.from_pretrained(world / "merged")
    assert not lora_layers(merged)
    torch.testing.assert_close(merged(IDS)["logits"], expected, atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(world / "merged")
    assert tokenizer.fingerprint == AutoTokenizer.from_pretrained(world / "elsewhere").fingerprint


def test_a_base_that_moved_is_given_by_name(world):
    (world / "base").rename(world / "elsewhere")
    given = ["merge", str(world / "adapter"), f"--model={world / 'elsewhere'}"]
    main([*given, f"--out={world / 'merged'}"])
    AutoModel.from_pretrained(world / "merged")


@pytest.mark.parametrize(
    ("folder", "out", "told"),
    [
        ("base", "merged", "has no adapter_config.json: it is not an adapter folder"),
        ("adapter", "base", "would replace what is read"),
    ],
)
def test_what_is_wrong_is_said(world, capsys, folder, out, told):
    with pytest.raises(SystemExit) as end:
        main(["merge", str(world / folder), f"--out={world / out}"])
    assert end.value.code == 1
    assert told in capsys.readouterr().err
