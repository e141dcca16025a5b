"""Which of llama.cpp's architectures computes our forward pass, and the metadata that tells it so.

Keys are written without the architecture's name in front, as in `attention.head_count`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Fields = Mapping[str, Any]
"""The fields of a model's architecture, by our names."""
Metadata = dict[str, int | float | bool | str]

_SIGMOID, _SOFTMAX = 2, 1


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One of llama.cpp's, as it fits a model."""

    name: str
    """`general.architecture`."""
    rope_interleaved: bool
    """Which channels it turns together; weights of the other kind must be reordered."""
    metadata: Metadata
    """Keys without the architecture's name, and their values."""
    tensors: dict[str, Tensor]
    """More tensors, under llama.cpp's own names."""


def choose_architecture(fields: Fields, frequency_divisors: Tensor) -> Architecture:
    """Choose among llama, qwen2, qwen3, qwen3moe and deepseek2.

    Args:
        fields: all fields of the architecture.
        frequency_divisors: by what `rope_scaling` divides the frequency of each rotary pair,
            (D/2,) float32.

    Raises:
        ValueError: llama.cpp computes something else; the message names the fields.
    """
    name = _name(fields)
    unknown = _unknown(name, fields)
    scaling, unknown_scaling = _rope_scaling(name, fields)
    unknown |= unknown_scaling
    if unknown:
        told = "; ".join(f"{field} {fields[field]!r} ({why})" for field, why in unknown.items())
        raise ValueError(f"llama.cpp's {name} does not compute this architecture: {told}")
    tensors = {}
    if fields["rope_scaling"] and fields["rope_scaling"]["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = frequency_divisors
    return Architecture(
        name=name,
        rope_interleaved=name in ("llama", "deepseek2"),
        metadata={**_shape(name, fields), **scaling},
        tensors=tensors,
    )


def _name(fields: Fields) -> str:
    if fields["attn_type"] == "mla":
        return "deepseek2"
    if fields["use_qk_norm"]:
        return "qwen3moe" if fields["ffn_type"] == "moe" else "qwen3"
    has_its_biases = fields["attention_bias"] and not fields["attention_output_bias"]
    is_square = fields["n_heads"] * fields["head_dim"] == fields["dim"]
    return "qwen2" if has_its_biases and is_square and not fields["ffn_bias"] else "llama"


def _unknown(name: str, fields: Fields) -> dict[str, str]:
    """Fields that this architecture of llama.cpp has no word for, and why."""
    latent, experts = name == "deepseek2", fields["ffn_type"] == "moe"
    window = fields["sliding_window"]
    groups = fields["n_expert_groups"]
    in_groups = fields["n_activated_groups"] < groups
    lite = fields["n_layers"] in (26, 27) or (fields["n_layers"], fields["vocab_size"]) == (
        48,
        128256,
    )
    rules: list[tuple[str, bool, str]] = [
        ("use_gated_attention", fields["use_gated_attention"], "no gate on the attention's output"),
        ("sliding_window", window is not None and window < fields["max_len"], "it sees all tokens"),
        ("attention_output_bias", name != "llama" and fields["attention_output_bias"], "no bias"),
        ("attention_bias", latent and fields["attention_bias"], "no bias"),
        ("ffn_bias", (name != "llama" or experts) and fields["ffn_bias"], "no bias"),
        (
            "latent_norm_eps",
            latent and fields["latent_norm_eps"] != fields["norm_eps"],
            f"one norm_eps for all norms, here {fields['norm_eps']}",
        ),
        # it takes models with these many layers for DeepSeek-V2-Lite
        ("q_lora_rank", latent and lite and fields["q_lora_rank"] is not None, "not at this depth"),
        ("ffn_type", experts and name in ("llama", "qwen2"), "experts only with use_qk_norm"),
    ]
    if experts and name == "qwen3moe":
        rules += [
            ("n_shared_experts", fields["n_shared_experts"] > 0, "no shared experts"),
            ("first_k_dense", fields["first_k_dense"] > 0, "experts in every block"),
            ("moe_scoring", fields["moe_scoring"] != "softmax", "softmax only"),
            ("moe_topk_method", fields["moe_topk_method"] == "noaux_tc" or in_groups, "top-k only"),
            ("norm_topk_prob", not fields["norm_topk_prob"], "always true"),
        ]
    if experts and latent:
        rules += [
            ("n_shared_experts", fields["n_shared_experts"] == 0, "at least one"),
            (
                "moe_topk_method",
                fields["moe_topk_method"] == "group_limited_greedy" and in_groups,
                "it ranks a group by its two best",
            ),
        ]
    return {field: why for field, is_unknown, why in rules if is_unknown}


def _shape(name: str, fields: Fields) -> Metadata:
    metadata: Metadata = {
        "context_length": fields["max_len"],
        "embedding_length": fields["dim"],
        "block_count": fields["n_layers"],
        "feed_forward_length": fields["dim_ffn"],
        "vocab_size": fields["vocab_size"],
        "attention.head_count": fields["n_heads"],
        "attention.layer_norm_rms_epsilon": float(fields["norm_eps"]),
        "rope.freq_base": float(fields["rope_theta"]),
    }
    if name == "deepseek2":
        rank, rotated = fields["kv_lora_rank"], fields["qk_rope_head_dim"]
        # it attends to the latents, one shared head
        metadata |= {
            "attention.head_count_kv": 1,
            "attention.key_length": rank + rotated,
            "attention.value_length": rank,
            "attention.key_length_mla": fields["qk_nope_head_dim"] + rotated,
            "attention.value_length_mla": fields["v_head_dim"],
            "attention.kv_lora_rank": rank,
            "attention.q_lora_rank": fields["q_lora_rank"] or 0,
            "rope.dimension_count": rotated,
        }
    else:
        width = fields["head_dim"]
        metadata |= {
            "attention.head_count_kv": fields["n_kv_heads"],
            "attention.key_length": width,
            "attention.value_length": width,
            "rope.dimension_count": width,
        }
    return {**metadata, **_experts(name, fields)}


def _experts(name: str, fields: Fields) -> Metadata:
    if name not in ("qwen3moe", "deepseek2"):
        return {}
    has_experts = fields["ffn_type"] == "moe"
    metadata: Metadata = {
        "expert_feed_forward_length": fields["dim_ffn_expert"],
        "expert_weights_scale": float(fields["routed_scaling_factor"]),
    }
    if has_experts:
        metadata |= {
            "expert_count": fields["n_routed_experts"],
            "expert_used_count": fields["n_activated_experts"],
        }
    if name == "qwen3moe":
        return metadata
    metadata |= {
        "leading_dense_block_count": fields["first_k_dense" if has_experts else "n_layers"],
        "expert_shared_count": fields["n_shared_experts"],
        "expert_weights_norm": fields["norm_topk_prob"],
        "expert_gating_func": _SIGMOID if fields["moe_scoring"] == "sigmoid" else _SOFTMAX,
    }
    if fields["n_activated_groups"] < fields["n_expert_groups"]:
        metadata |= {
            "expert_group_count": fields["n_expert_groups"],
            "expert_group_used_count": fields["n_activated_groups"],
        }
    return metadata


def _rope_scaling(name: str, fields: Fields) -> tuple[Metadata, dict[str, str]]:
    """Metadata of a stretched rotary embedding, or why there is none."""
    scaling = fields["rope_scaling"]
    if scaling is None:
        return {}, {}
    rules: dict[str, Callable[[str, Fields], Metadata | str]] = {
        "linear": _linear,
        "llama3": _llama3,
        "yarn": _yarn,
    }
    found = rules[scaling["rope_type"]](name, scaling)
    return ({}, {"rope_scaling": found}) if isinstance(found, str) else (found, {})


def _linear(name: str, scaling: Fields) -> Metadata | str:
    if name == "deepseek2":
        return "it would scale the scores by a factor of YaRN's"
    return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}


def _llama3(name: str, scaling: Fields) -> Metadata | str:
    del scaling
    return {} if name == "llama" else "only its llama takes frequencies of llama3"


def _yarn(name: str, scaling: Fields) -> Metadata | str:
    factor, all_dims = scaling["factor"], scaling["mscale_all_dim"] or 0
    if scaling["beta_fast"] not in (None, 32) or scaling["beta_slow"] not in (None, 1):
        return "beta_fast is always 32 and beta_slow 1"
    if not scaling["truncate"]:
        return "truncate is always true"
    metadata: Metadata = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(factor),
        "rope.scaling.original_context_length": scaling["original_max_len"],
    }
    # what it multiplies cosines and sines by of its own accord, where it knows no mscale_all_dim
    assumed = 0.1 * math.log(factor) + 1.0
    amplitude = _amplitude(scaling)
    if name == "deepseek2":
        # the amplitude would scale the part of a score too that is not rotated
        if abs(amplitude - 1) > 1e-6:
            return "mscale and mscale_all_dim must be equal, or attention_factor 1"
        if all_dims:
            return {**metadata, "rope.scaling.yarn_log_multiplier": 0.1 * all_dims}
    return {**metadata, "rope.scaling.attn_factor": amplitude / assumed}


def _amplitude(scaling: Fields) -> float:
    factor = scaling["factor"]

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    if scaling["attention_factor"] is not None:
        return scaling["attention_factor"]
    if scaling["mscale"] and scaling["mscale_all_dim"]:
        return temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    return temperature(1.0)
