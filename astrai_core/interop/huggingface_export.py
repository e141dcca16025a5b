"""Our fields in the words of a Hugging Face family's `config.json`: the way back of `huggingface`.

A file written here means exactly what `huggingface.to_fields` reads out of it, and whoever exports
compares the two: a field that a family cannot say shows as a difference, by its name. Where key
names changed between versions of transformers, both are written.
"""

from collections.abc import Callable, Mapping

from astrai_core.interop.huggingface.families import NAMES
from astrai_core.interop.huggingface.json_values import Json

Fields = Mapping[str, object]
"""The fields of a model's architecture, by our names."""

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
"""The families, in the order in which they are tried, and the classes that transformers loads."""

_SHAPE = {**NAMES, "num_key_value_heads": "n_kv_heads"}
_LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def to_config(family: str, fields: Fields) -> Json:
    """Say fields in a family's words, as far as it has them.

    Args:
        family: a key of `CLASSES`.
        fields: all fields of the architecture.
    """
    config: Json = {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        **{theirs: fields[ours] for theirs, ours in _SHAPE.items()},
        **_rope(fields),
    }
    _WRITERS[family](config, fields)
    return config


def cannot_say(family: str, fields: Fields) -> list[str]:
    """Names of fields at values that transformers' class of a family refuses."""
    dim, heads = fields["dim"], fields["n_heads"]
    assert isinstance(dim, int)
    assert isinstance(heads, int)
    divides = family not in ("llama", "deepseek_v2") or dim % heads == 0
    return [] if divides else ["dim"]


def _rope(fields: Fields) -> Json:
    theta, scaling = fields["rope_theta"], fields["rope_scaling"]
    rule: Json = {"rope_type": "default"}
    if isinstance(scaling, Mapping):
        rule = {key: value for key, value in scaling.items() if value is not None}
        length = rule.pop("original_max_len", None)
        if length is not None:
            rule["original_max_position_embeddings"] = length
        if rule["rope_type"] != "yarn" or rule["truncate"]:
            del rule["truncate"]  # the default
    parameters: Json = {**rule, "rope_theta": theta}
    # up to version 4 of transformers rope_theta stood alone and the rest was rope_scaling
    return {
        "rope_parameters": parameters,
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else parameters,
    }


def _write_llama(config: Json, fields: Fields) -> None:
    config["head_dim"] = fields["head_dim"]
    config["attention_bias"] = fields["attention_bias"]
    config["mlp_bias"] = fields["ffn_bias"]


def _write_mistral(config: Json, fields: Fields) -> None:
    config["head_dim"] = fields["head_dim"]
    config["sliding_window"] = fields["sliding_window"]


def _write_qwen2(config: Json, fields: Fields) -> None:
    config["head_dim"] = fields["head_dim"]
    window, windowed = fields["sliding_window"], fields["sliding_window_layers"]
    n_layers = fields["n_layers"]
    assert isinstance(n_layers, int)
    layers = range(n_layers) if windowed is None else windowed
    assert isinstance(layers, range | tuple | list)
    blocks = set(layers) if window else set[int]()
    config["use_sliding_window"] = bool(window)
    config["sliding_window"] = window
    # versions without layer_types take all blocks from this one on
    config["max_window_layers"] = min(blocks, default=n_layers)
    kinds = ("full_attention", "sliding_attention")
    config["layer_types"] = [kinds[layer in blocks] for layer in range(n_layers)]


def _write_qwen3(config: Json, fields: Fields) -> None:
    _write_qwen2(config, fields)
    config["attention_bias"] = fields["attention_bias"]


def _write_qwen3_moe(config: Json, fields: Fields) -> None:
    first_dense = fields["first_k_dense"]
    assert isinstance(first_dense, int)
    config |= {
        "head_dim": fields["head_dim"],
        "attention_bias": fields["attention_bias"],
        "use_sliding_window": fields["sliding_window"] is not None,
        "sliding_window": fields["sliding_window"],
        "num_experts": fields["n_routed_experts"],
        "num_experts_per_tok": fields["n_activated_experts"],
        "moe_intermediate_size": fields["dim_ffn_expert"],
        "norm_topk_prob": fields["norm_topk_prob"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(first_dense)),
        "output_router_logits": False,
    }


def _write_deepseek(config: Json, fields: Fields) -> None:
    config |= {name: fields[name] for name in _LATENT}
    config["attention_bias"] = fields["attention_bias"]
    has_experts = fields["ffn_type"] == "moe"
    # blocks without experts alone: one expert that no block has
    config |= {
        "n_routed_experts": fields["n_routed_experts"] or 1,
        "n_shared_experts": fields["n_shared_experts"],
        "num_experts_per_tok": fields["n_activated_experts"] or 1,
        "moe_intermediate_size": fields["dim_ffn_expert"] or fields["dim_ffn"],
        "first_k_dense_replace": fields["first_k_dense" if has_experts else "n_layers"],
        "moe_layer_freq": 1,
        "norm_topk_prob": fields["norm_topk_prob"],
        "routed_scaling_factor": fields["routed_scaling_factor"],
        "n_group": fields["n_expert_groups"],
        "topk_group": fields["n_activated_groups"],
    }


def _write_deepseek_v2(config: Json, fields: Fields) -> None:
    _write_deepseek(config, fields)
    is_known = fields["moe_topk_method"] != "noaux_tc"
    config["topk_method"] = fields["moe_topk_method"] if is_known else "greedy"
    config["scoring_func"] = "softmax"


def _write_deepseek_v3(config: Json, fields: Fields) -> None:
    _write_deepseek(config, fields)
    config["rope_interleave"] = fields["rope_interleaved"]
    config["topk_method"] = "noaux_tc"
    config["scoring_func"] = "sigmoid"
    config["num_nextn_predict_layers"] = 0


_WRITERS: dict[str, Callable[[Json, Fields], None]] = {
    "llama": _write_llama,
    "mistral": _write_mistral,
    "qwen2": _write_qwen2,
    "qwen3": _write_qwen3,
    "qwen3_moe": _write_qwen3_moe,
    "deepseek_v2": _write_deepseek_v2,
    "deepseek_v3": _write_deepseek_v3,
}
