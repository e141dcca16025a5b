import json
from typing import Any

import pytest

from astrai_core.model import ModelConfig
from astrai_core.model.rope_scaling import RopeScaling

MLA: dict[str, Any] = {
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


def test_the_seed_names_all_its_fields():
    named = """vocab_size dim n_layers norm_eps dim_ffn tie_weight max_len rope_theta n_heads
        n_kv_heads use_qk_norm use_gated_attention attn_type ffn_type n_routed_experts
        n_shared_experts n_activated_experts moe_topk_method"""
    assert set(named.split()) <= ModelConfig().to_dict().keys()


MOE: dict[str, Any] = {
    "ffn_type": "moe",
    "n_routed_experts": 8,
    "n_activated_experts": 2,
    "dim_ffn_expert": 8,
}
GROUPED: dict[str, Any] = {
    "moe_topk_method": "noaux_tc",
    "n_expert_groups": 2,
    "n_activated_groups": 1,
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_len": 64}
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "original_max_len": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        MLA,
        {"sliding_window": 7, "sliding_window_layers": (1, 3), "attention_bias": True},
        {"rope_scaling": RopeScaling(rope_type="yarn", factor=4.0, original_max_len=64)},
        {**MOE, "moe_topk_method": "noaux_tc", "n_expert_groups": 4, "n_activated_groups": 2},
    ],
)
def test_every_field_survives_a_file_of_any_name(changes, tmp_path):
    config = ModelConfig(**changes)
    config.save(tmp_path / "shape.json")
    assert ModelConfig.load(tmp_path / "shape.json") == config
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_file_that_is_no_object_is_named(tmp_path):
    for content, message in (("[1]", "must hold a JSON object"), ("{", "is not readable JSON")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"config.json {message}"):
            ModelConfig.load(tmp_path)


def test_windows_are_for_the_named_blocks():
    config = ModelConfig(sliding_window=7, sliding_window_layers=(1, 3))
    assert [config.window(layer) for layer in range(4)] == [None, 7, None, 7]
    assert ModelConfig(sliding_window=7).window(0) == 7


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
        ({"norm_eps": True}, "norm_eps must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number"),
        ({"rope_theta": "10000"}, "rope_theta must be a positive number"),
        ({"dim": 2.0}, "dim must be a positive integer"),
        ({"n_heads": True}, "n_heads must be a positive integer"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer or null"),
        ({"n_kv_heads": 0}, "n_kv_heads must be a positive integer or null"),
        ({"attn_type": "mha"}, "attn_type must be one of gqa, mla"),
        ({"kv_lora_rank": 16}, "kv_lora_rank are for attn_type mla"),
        ({"attn_type": "mla"}, "attn_type mla needs kv_lora_rank"),
        ({**MLA, "use_qk_norm": True}, "use_qk_norm true contradicts attn_type mla"),
        ({**MLA, "n_kv_heads": 2}, "n_kv_heads 2 contradicts attn_type mla"),
        ({**MLA, "head_dim": 32}, "head_dim 32 contradicts attn_type mla"),
        ({**MLA, "qk_rope_head_dim": 3}, "qk_rope_head_dim 3 must be even"),
        ({"moe_topk_method": "noaux_tc"}, "moe_topk_method are for ffn_type moe"),
        (
            {
                "ffn_type": "moe",
                "n_routed_experts": 4,
                "n_activated_experts": 5,
                "dim_ffn_expert": 8,
            },
            "n_activated_experts 5 exceeds n_routed_experts 4",
        ),
        ({"n_routed_experts": 4}, "n_routed_experts are for ffn_type moe"),
        ({"ffn_type": "moe", "n_routed_experts": 4}, "ffn_type moe needs n_activated_experts"),
        ({"norm_topk_prob": True, "first_k_dense": 1}, "norm_topk_prob, first_k_dense are for"),
        ({**MOE, "first_k_dense": 6}, "first_k_dense 6 leaves none of the n_layers 6"),
        ({**MOE, "n_expert_groups": 2}, "n_expert_groups 2 and n_activated_groups 1 contradict"),
        ({**MOE, **GROUPED, "n_expert_groups": 3}, "n_expert_groups 3 must divide"),
        ({**MOE, **GROUPED, "n_activated_groups": 3}, "n_activated_groups 3 must be from 1"),
        ({**MOE, **GROUPED, "n_activated_experts": 5}, "exceeds the 4 experts in each"),
        (
            {**MOE, **GROUPED, "n_expert_groups": 8, "n_activated_experts": 1},
            "n_expert_groups 8 leaves one expert a group",
        ),
        ({"rope_scaling": 4}, "rope_scaling must be a mapping"),
        ({"rope_scaling": {**YARN, "factr": 2}}, "did you mean factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: .*'factor'"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor must be at least 1"),
        ({"rope_scaling": {**YARN, "beta_fast": -1}}, "rope_scaling.beta_fast must be a positive"),
        ({"rope_scaling": {**YARN, "rope_type": "ntk"}}, "rope_type must be one of linear, llama3"),
        ({"rope_scaling": LLAMA3}, "llama3 needs rope_scaling.low_freq_factor"),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "high_freq_factor 4.0 must exceed rope_scaling.low_freq_factor 4.0",
        ),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "rope_scaling.truncate must be true or false"),
        ({"rope_scaling": {**YARN, "low_freq_factor": 1}}, "low_freq_factor do not belong"),
        ({"sliding_window_layers": [0]}, "sliding_window_layers needs a sliding_window"),
        (
            {"sliding_window": 4, "sliding_window_layers": [6]},
            r"\[6\] must name blocks from 0 to 5",
        ),
    ],
)
def test_a_bad_field_is_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_dict(fields)
