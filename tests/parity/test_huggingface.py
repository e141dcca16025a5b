"""Folders in the shapes they come in: sharded, rounded, of older spellings, with spare layers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from astrai_core.model import AutoModel, Transformer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

QWEN = "qwen3 tied"
EXPERTS = "qwen3_moe"
DEEPSEEK = "deepseek_v3 query latent, groups, bias, halves"
IDS = torch.randint(300, (1, 9), generator=torch.Generator().manual_seed(0))


def assert_equal(ours: Transformer, theirs) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)["logits"], theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def change_config(folder, **changes):
    """Rewrite config.json; None takes a key away."""
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", [QWEN, EXPERTS, DEEPSEEK])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_shards_load(name, dtype, make_family, tmp_path):
    theirs = make_family(name, tmp_path).to(dtype)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = AutoModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert {buffer.dtype for buffer in ours.buffers()} <= {torch.float32}, "the router's bias"
    # loaded anew: a model that was rounded and is widened again has rounded rotary frequencies
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_equal(AutoModel.from_pretrained(tmp_path, dtype=torch.float32), whole)


def test_the_spellings_before_transformers_5_are_read_alike(make_family, tmp_path):
    make_family("deepseek_v2 query latent, groups, biases, yarn", tmp_path)
    rule = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    del rule["rope_type"]
    change_config(
        tmp_path,
        rope_parameters=None,
        rope_theta=rule.pop("rope_theta"),
        rope_scaling={**rule, "type": "yarn"},
        qk_head_dim=None,
        head_dim=None,
        moe_layer_freq=1,
        scoring_func="softmax",
        aux_loss_alpha=0.001,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.rope_parameters["mscale_all_dim"] == 0.707
    assert_equal(AutoModel.from_pretrained(tmp_path), theirs)


def add_further_layer(folder):
    """As DeepSeek-V3 publishes it, a layer behind the last one with matrices of its own."""
    content = load_file(folder / "model.safetensors")
    last = {name: t for name, t in content.items() if name.startswith("model.layers.2.")}
    content |= {name.replace("layers.2", "layers.3"): t * 2 for name, t in last.items()}
    content["model.layers.3.eh_proj.weight"] = torch.ones(32, 64)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def test_layers_for_tokens_further_ahead_are_left_out_and_said(make_family, tmp_path, caplog):
    theirs = make_family(DEEPSEEK, tmp_path / "theirs")
    add_further_layer(tmp_path / "theirs")
    ours = AutoModel.from_pretrained(tmp_path / "theirs")
    assert "1 of its layers only predict tokens further ahead; they are not loaded" in caplog.text
    assert_equal(ours, theirs)
    AutoModel.save_pretrained(ours, tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["num_nextn_predict_layers"] == 0
    change_config(tmp_path / "theirs", num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"unknown tensor layers\.3\."):
        AutoModel.from_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ({"mystery": 3}, "mystery"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(changes, named, make_family, tmp_path):
    make_family("llama tied", tmp_path, **changes)
    with pytest.raises(ValueError, match=named):
        AutoModel.from_pretrained(tmp_path)


def test_a_folder_loaded_in_float32_says_so_when_it_is_saved(make_family, tmp_path):
    """transformers takes the type of the weights from config.json, not from the weights."""
    make_family(QWEN, tmp_path / "theirs").bfloat16().save_pretrained(tmp_path / "theirs")
    ours = AutoModel.from_pretrained(tmp_path / "theirs", torch.float32)
    with torch.no_grad():
        ours.norm.weight.add_(1e-4)  # a step too small for bfloat16
    AutoModel.save_pretrained(ours, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.dtype == torch.float32
    assert torch.equal(back.model.norm.weight, ours.norm.weight)


def test_an_unknown_family_is_refused_by_name(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'gpt2' is not supported; known are astrai"):
        AutoModel.from_pretrained(tmp_path)
