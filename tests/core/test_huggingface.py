"""What config.json files, as the families publish them, mean in our fields."""

from typing import Any

import pytest

from astrai_core.interop import huggingface
from astrai_core.model import ModelConfig
from astrai_core.model.rope_scaling import RopeScaling

Json = dict[str, Any]

LLAMA: Json = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
}  # fmt: skip
QWEN2: Json = {
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_MOE: Json = {
    "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
DEEPSEEK_V2_LITE: Json = {
    "model_type": "deepseek_v2", "attention_bias": False, "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128,
    "vocab_size": 102400,
}  # fmt: skip
DEEPSEEK_V3: Json = {
    **DEEPSEEK_V2_LITE, "model_type": "deepseek_v3", "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_key_value_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4,
    "topk_method": "noaux_tc", "vocab_size": 129280,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip


def read(config: Json, **changes: object) -> ModelConfig:
    return ModelConfig.from_dict(huggingface.to_fields({**config, **changes}))


def test_llama_as_published():
    config = read(LLAMA)
    assert (config.dim, config.head_dim, config.num_kv_heads) == (4096, 128, 8)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_len=8192,
    )
    assert not config.tie_weight


def test_qwen2_as_published_and_with_its_advice_for_long_texts():
    config = read(QWEN2)
    assert config.sliding_window is None
    assert (config.attention_bias, config.attention_output_bias) == (True, False)
    rule = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    assert read(QWEN2, rope_scaling=rule).rope_scaling == RopeScaling(
        rope_type="yarn", factor=4.0, original_max_len=32768
    )
    windows = read(QWEN2, use_sliding_window=True, sliding_window=100)
    assert windows.sliding_window_layers == (21, 22, 23)
    assert (windows.window(20), windows.window(21)) == (None, 100)


def test_qwen3_moe_as_published():
    config = read(QWEN3_MOE)
    assert (config.n_routed_experts, config.n_activated_experts) == (128, 8)
    assert (config.moe_scoring, config.norm_topk_prob) == ("softmax", True)
    assert (config.n_shared_experts, config.first_k_dense) == (0, 0)
    assert config.use_qk_norm


def test_deepseek_v2_as_published():
    config = read(DEEPSEEK_V2_LITE)
    assert (config.q_lora_rank, config.kv_lora_rank, config.query_dim) == (None, 512, 192)
    assert (config.moe_topk_method, config.moe_scoring) == ("greedy", "softmax")
    assert config.rope_interleaved
    assert config.rope_scaling is not None
    assert config.rope_scaling.mscale_all_dim == 0.707


def test_deepseek_v3_as_published():
    config = read(DEEPSEEK_V3)
    assert (config.n_expert_groups, config.n_activated_groups) == (8, 4)
    assert (config.moe_topk_method, config.moe_scoring) == ("noaux_tc", "sigmoid")
    assert (config.routed_scaling_factor, config.first_k_dense) == (2.5, 3)
    assert huggingface.further_layers(DEEPSEEK_V3, 61) == range(61, 62)
    assert huggingface.saved_config(DEEPSEEK_V3)["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3_MOE, DEEPSEEK_V2_LITE, DEEPSEEK_V3])
def test_the_spellings_of_transformers_5_mean_the_same(config):
    new = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}
    rule = dict(config.get("rope_scaling") or {})
    rule["rope_type"] = rule.pop("type", rule.get("rope_type", "default"))
    new["rope_parameters"] = {"rope_theta": config["rope_theta"], **rule}
    if "num_experts" in new:
        new["num_local_experts"] = new.pop("num_experts")
    if "kv_lora_rank" in new:
        new |= {"head_dim": 64, "qk_head_dim": 192}
    assert read(new) == read(config)


def test_a_mixture_without_any_block_of_experts_is_a_dense_model():
    dense = read(QWEN3_MOE, mlp_only_layers=list(range(48)))
    assert (dense.ffn_type, dense.dim_ffn) == ("mlp", 6144)
    assert read(DEEPSEEK_V3, first_k_dense_replace=61).ffn_type == "mlp"


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, {"mystery": 3}, "llama: config.json key 'mystery' .3. is not understood"),
        (LLAMA, {"hidden_act": "gelu"}, "llama: hidden_act 'gelu' is not supported"),
        (LLAMA, {"sliding_window": 5}, "sliding_window 5 is not supported"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not"),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "linear|factor"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0, "odd": 1}}, "yarn: odd is not"),
        (LLAMA, {"rope_scaling": "yarn"}, "rope parameters 'yarn' are not understood"),
        (LLAMA, {"rope_parameters": {"rope_theta": 3.0}}, "contradict each other"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (LLAMA, {"rope_theta": "much"}, "rope_theta must be a number, not 'much'"),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "quantization_config .*awq.* not supported; write the folder in bfloat16 first",
        ),
        (QWEN2, {"layer_types": ["full_attention"]}, "does not name 24 blocks"),
        (QWEN2, {"layer_types": ["linear_attention"] * 24}, "linear_attention are not supported"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "there is no sliding_window"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
        (QWEN3_MOE, {"mlp_only_layers": [0, 2]}, r"mlp_only_layers \[0, 2\] is not supported"),
        (QWEN3_MOE, {"num_local_experts": 4}, r"num_experts must be one number, not \[128, 4\]"),
        (
            QWEN3_MOE,
            {"use_sliding_window": True, "sliding_window": 9},
            "max_window_layers 48 is not supported",
        ),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob True is not supported"),
        (DEEPSEEK_V2_LITE, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        (DEEPSEEK_V2_LITE, {"num_key_value_heads": 4}, "num_key_value_heads 4 contradicts latent"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        (DEEPSEEK_V3, {"head_dim": 128}, "head_dim 128 contradicts latent attention: it is 64"),
        (
            DEEPSEEK_V3,
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
            "quantization_config .*fp8.* is not supported",
        ),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, dict) or len(value) < 4 else "",
)
def test_what_would_be_ignored_or_guessed_is_refused_by_name(config, changes, message):
    with pytest.raises(ValueError, match=message):
        read(config, **changes)


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE, DEEPSEEK_V3])
def test_a_shape_is_never_assumed(config):
    for key in ("hidden_size", "moe_intermediate_size", "q_lora_rank", "num_experts_per_tok"):
        if key in config:
            rest = {name: value for name, value in config.items() if name != key}
            with pytest.raises(ValueError, match=f"config.json lacks {key}"):
                read(rest)
