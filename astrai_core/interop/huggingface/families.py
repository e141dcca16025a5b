"""The families of Hugging Face folders, and what each one's `config.json` means in our fields."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from astrai_core.interop.huggingface.blocks import (
    read_attention_bias,
    read_deepseek_experts,
    read_layer_windows,
    read_qwen_experts,
    read_window,
)
from astrai_core.interop.huggingface.json_values import Json, given, told
from astrai_core.interop.huggingface.rope import read_rope

Reader = Callable[[Json, Json], set[str]]
"""Sets fields from a config and returns the keys that it read."""

# keys that say nothing about the forward pass of inference or of our training
_SILENT = {
    "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "torch_dtype", "transformers_version", "unsloth_version",
    "use_cache", "_name_or_path", "_attn_implementation", "sep_token_id", "tokenizer_class",
    "unsloth_fixed", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
    # how experts are spread over machines, how their load is balanced in training, and the layers
    # behind the last one, which are not read
    "ep_size", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "output_router_logits",
    "num_nextn_predict_layers", "num_mtp_layers",
}  # fmt: skip

# keys that are only understood at one value
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
}

NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "dim_ffn",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_weight",
    "max_position_embeddings": "max_len",
    "num_attention_heads": "n_heads",
}
"""What every family has, in its words and in ours; read and written."""
_HEADS = {"num_key_value_heads": "n_kv_heads", "head_dim": "head_dim"}
_LATENT = {
    name: name
    for name in (
        "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    )
}  # fmt: skip

# the shape itself is never assumed
_NEEDED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
)  # fmt: skip

# what the families' configuration classes assume where config.json is silent
_COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}


@dataclass(frozen=True, kw_only=True)
class _Family:
    defaults: Json
    """Where config.json is silent, beside those of all families."""
    names: Mapping[str, str]
    """Keys that are a field of ours under another name."""
    constant: Json = field(default_factory=dict)
    """Fields that no key says."""
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Keys that are only understood at one value."""
    needed: tuple[str, ...] = ()
    """Keys that must be there, beside those of all families."""
    readers: tuple[Reader, ...]


def _read_latent_heads(config: Json, fields: Json) -> set[str]:
    """Refuse widths and head counts that latent attention does not have."""
    del fields
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    implied = {
        "head_dim": rope,  # the width that is rotated
        "qk_head_dim": nope + rope if isinstance(nope, int) and isinstance(rope, int) else None,
        "num_key_value_heads": config["num_attention_heads"],
    }
    for key, value in implied.items():
        if given(config, key, value) != value:
            raise ValueError(f"{key} {config[key]!r} contradicts latent attention: it is {value}")
    return set(implied)


_NO_WINDOW = {"sliding_window": (None,), "layer_types": (None,)}
_LATENT_FIELDS: Json = {"attn_type": "mla", "use_qk_norm": False}
_FAMILIES = {
    "llama": _Family(
        defaults={"max_position_embeddings": 2048},
        names={**NAMES, **_HEADS, "mlp_bias": "ffn_bias"},
        constant={"use_qk_norm": False},
        fixed={**_NO_WINDOW, "rope_interleaved": (False, None)},
        readers=(read_rope, read_attention_bias),
    ),
    "mistral": _Family(
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        names={**NAMES, **_HEADS},
        constant={"use_qk_norm": False},
        fixed={"attention_bias": (False, None)},
        readers=(read_rope, read_window),
    ),
    "qwen2": _Family(
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        names={**NAMES, **_HEADS},
        constant={"use_qk_norm": False, "attention_bias": True},  # on q, k and v, without a switch
        readers=(read_rope, read_layer_windows),
    ),
    "qwen3": _Family(
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        names={**NAMES, **_HEADS},
        constant={"use_qk_norm": True},
        readers=(read_rope, read_layer_windows, read_attention_bias),
    ),
    "qwen3_moe": _Family(
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
        },
        names={**NAMES, **_HEADS},
        constant={"use_qk_norm": True},
        fixed={"decoder_sparse_step": (1,), "layer_types": (None,)},
        needed=("moe_intermediate_size", "num_experts_per_tok"),
        readers=(read_rope, read_window, read_attention_bias, read_qwen_experts),
    ),
    "deepseek_v2": _Family(
        defaults={"max_position_embeddings": 2048, "topk_method": "greedy", "n_shared_experts": 2},
        names={**NAMES, **_LATENT},
        constant={**_LATENT_FIELDS, "rope_interleaved": True, "moe_scoring": "softmax"},
        fixed={
            **_NO_WINDOW,
            "mlp_bias": (False, None),
            "moe_layer_freq": (1,),
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            # its authors' code then drops routed_scaling_factor, and transformers the division
            "norm_topk_prob": (False, None),
            "rope_interleave": (True, None),
        },
        needed=(*_LATENT, "moe_intermediate_size", "num_experts_per_tok", "n_routed_experts"),
        readers=(read_rope, read_attention_bias, read_deepseek_experts, _read_latent_heads),
    ),
    "deepseek_v3": _Family(
        defaults={
            "max_position_embeddings": 4096,
            "topk_method": "noaux_tc",
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "rope_interleave": True,
        },
        names={
            **NAMES,
            **_LATENT,
            "rope_interleave": "rope_interleaved",
            "norm_topk_prob": "norm_topk_prob",
        },
        constant={**_LATENT_FIELDS, "moe_scoring": "sigmoid"},
        fixed={
            **_NO_WINDOW,
            "moe_layer_freq": (1,),
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
        },
        needed=(*_LATENT, "moe_intermediate_size", "num_experts_per_tok", "n_routed_experts"),
        readers=(read_rope, read_attention_bias, read_deepseek_experts, _read_latent_heads),
    ),
}

FAMILIES = tuple(_FAMILIES)


def to_fields(config: Json) -> Json:
    """Translate a family's `config.json` into `ModelConfig` fields.

    Raises:
        ValueError: an unknown family, a key that we would have to ignore, or one that is missing.
    """
    name = config.get("model_type")
    if name not in _FAMILIES:
        raise ValueError(
            f"model_type {name!r} is not supported; known are astrai, {', '.join(FAMILIES)}"
        )
    family = _FAMILIES[str(name)]
    missing = [key for key in (*_NEEDED, *family.needed) if key not in config]
    if missing:
        raise ValueError(f"{name}: config.json lacks {', '.join(missing)}")
    config = {**_COMMON, **family.defaults, **config}
    fixed = {**_FIXED, **family.fixed}
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            raise ValueError(f"{name}: {key} {told(config[key])} is not supported{_way_out(key)}")
    fields = {**family.constant}
    fields |= {ours: config[theirs] for theirs, ours in family.names.items() if theirs in config}
    handled = set(family.names) | set(fixed) | _SILENT
    try:
        for read in family.readers:
            handled |= read(config, fields)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    for key, value in config.items():
        if key not in handled:
            raise ValueError(f"{name}: config.json key {key!r} ({told(value)}) is not understood")
    return fields


def _way_out(key: str) -> str:
    if key == "quantization_config":
        return "; write the folder in bfloat16 first, or take one that is"
    return ""
