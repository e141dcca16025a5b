import json

import pytest

from astrai_core.model import ModelConfig

MLA = {
    "attn_type": "mla",
    "use_qk_norm": False,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def test_saved_fields_come_back(tmp_path):
    config = ModelConfig(vocab_size=100, n_kv_heads=2, rope_theta=5e5)
    config.save(tmp_path)
    assert ModelConfig.load(tmp_path) == config
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "astrai"


def test_derived_widths():
    config = ModelConfig(dim=96, n_heads=6, n_kv_heads=2)
    assert (config.head_dim, config.cache_shape) == (16, (2, 16, 16))
    assert ModelConfig(**MLA).cache_shape == (1, 20, 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dimm": 3}, "did you mean dim"),
        ({"n_heads": 6, "n_kv_heads": 4}, "n_kv_heads 4 must divide n_heads 6"),
        ({"dim": 100, "n_heads": 8}, "dim 100 is not a multiple of n_heads 8"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer"),
        ({"tie_weight": "yes"}, "tie_weight must be true or false"),
        ({"norm_eps": 0}, "norm_eps must be a positive number"),
        ({"attn_type": "mha"}, "attn_type must be one of gqa, mla"),
        ({"kv_lora_rank": 16}, "kv_lora_rank are for attn_type mla"),
        ({"attn_type": "mla"}, "attn_type mla needs kv_lora_rank"),
        ({**MLA, "use_qk_norm": True}, "use_qk_norm true contradicts attn_type mla"),
        ({"n_routed_experts": 4}, "n_routed_experts are for ffn_type moe"),
        ({"ffn_type": "moe", "n_routed_experts": 4}, "ffn_type moe needs n_activated_experts"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_dict(fields)
