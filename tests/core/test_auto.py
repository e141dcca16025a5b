import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from astrai_core.model import AutoModel, ModelConfig, Transformer

SMALL: dict[str, Any] = {"vocab_size": 20, "dim": 16, "n_layers": 1, "dim_ffn": 24, "n_heads": 2}
MLA: dict[str, Any] = {
    "attn_type": "mla",
    "use_qk_norm": False,
    "kv_lora_rank": 8,
    "q_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
}


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_weight": False}, {"use_gated_attention": True, "attention_bias": True}, MLA],
    ids=["tied", "untied", "gated", "mla"],
)
def test_a_saved_model_comes_back_equal(fields, tmp_path):
    model = Transformer(ModelConfig(**SMALL, **fields)).eval()
    AutoModel.save_pretrained(model, tmp_path / "m")
    back = AutoModel.from_pretrained(tmp_path / "m")
    ids = torch.randint(20, (2, 5))
    assert back.config == model.config
    assert not back.training
    assert torch.equal(back(ids)["logits"], model(ids)["logits"])
    assert all(parameter.requires_grad for parameter in back.parameters())


def test_files_carry_the_names_that_others_know(tmp_path):
    AutoModel.save_pretrained(Transformer(ModelConfig(**SMALL, tie_weight=False)), tmp_path / "m")
    names = load_file(tmp_path / "m" / "model.safetensors").keys()
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= names
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_the_loaded_model_owns_its_memory(tmp_path):
    """The file may be replaced or go away while the model is in use."""
    model = Transformer(ModelConfig(**SMALL))
    AutoModel.save_pretrained(model, tmp_path / "m")
    back = AutoModel.from_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(back.norm.weight, model.norm.weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json: it is not a model folder"),
        ("{", r"config.json is not readable JSON"),
        ("[]", "must hold a JSON object"),
        ('{"dimm": 3}', r"config.json: unknown model field 'dimm'; did you mean dim"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2' is not supported; known are astrai, llama"),
    ],
    ids=str,
)
def test_a_folder_that_is_no_model_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path)


def test_a_name_on_the_hub_is_not_a_folder():
    with pytest.raises(ValueError, match="someone/model does not exist; pass a model folder"):
        AutoModel.from_pretrained("someone/model")


def test_a_folder_without_weights_can_be_built_at_random_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig(**SMALL).to_dict()))
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        AutoModel.from_pretrained(tmp_path)
    assert AutoModel.random(tmp_path, torch.bfloat16).norm.weight.dtype == torch.bfloat16
