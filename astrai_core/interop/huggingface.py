"""Hugging Face folders: which `config.json` means which of our fields, and the tensors' names.

Plain dicts and names only; nothing here knows the model. A key that would change the result and
that we do not know is refused by name, never skipped.
"""

Json = dict[str, object]

# keys that say nothing about the forward pass of inference or of our training
_SILENT = {
    "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "torch_dtype", "transformers_version", "unsloth_version",
    "use_cache", "_name_or_path", "_attn_implementation", "sep_token_id", "tokenizer_class",
    "unsloth_fixed", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
}  # fmt: skip

# keys that are only understood at one value
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, 1, None),
    "quantization_config": (None,),
    "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
}

_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "dim_ffn",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_weight",
    "max_position_embeddings": "max_len",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
}

# what each family's configuration class assumes where config.json is silent
_DEFAULTS: dict[str, Json] = {
    "llama": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 32768},
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "head_dim": 128,
    },
}

FAMILIES = tuple(_DEFAULTS)


def to_fields(config: Json) -> Json:
    """Translate a family's `config.json` into `ModelConfig` fields.

    Raises:
        ValueError: an unknown family, or a key that we would have to ignore.
    """
    family = config.get("model_type")
    if family not in _DEFAULTS:
        raise ValueError(
            f"model_type {family!r} is not supported; known are astrai, {', '.join(FAMILIES)}"
        )
    config = {**_DEFAULTS[str(family)], **config}
    fields: Json = {ours: config[theirs] for theirs, ours in _NAMES.items() if theirs in config}
    handled = set(_NAMES) | _SILENT
    for read in (_read_rope, _read_window, _read_bias):
        handled |= read(config, fields)
    fields["use_qk_norm"] = family == "qwen3"
    for key, value in config.items():
        if key in _FIXED:
            if value not in _FIXED[key]:
                raise ValueError(f"{family}: {key} {value!r} is not supported")
        elif key not in handled:
            raise ValueError(f"{family}: config.json key {key!r} ({value!r}) is not understood")
    return fields


def _read_rope(config: Json, fields: Json) -> set[str]:
    # transformers 5 moved rope_theta and rope_scaling into rope_parameters
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope parameters {parameters!r} are not understood")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope scaling {kind!r} is not supported yet; only the default rope is")
    extra = set(parameters) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if extra or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rope parameters {parameters!r} are not understood")
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    if not isinstance(theta, int | float):
        raise ValueError(f"rope_theta must be a number, not {theta!r}")
    fields["rope_theta"] = float(theta)
    return {"rope_parameters", "rope_scaling", "rope_theta"}


def _read_window(config: Json, fields: Json) -> set[str]:
    window = config.get("sliding_window")
    if config["model_type"] in ("qwen2", "qwen3") and not config.get("use_sliding_window", False):
        window = None
    kinds = config.get("layer_types") or []
    wanted = "sliding_attention" if window else "full_attention"
    if not isinstance(kinds, list) or any(kind != wanted for kind in kinds):
        raise ValueError(f"layer_types {kinds!r} do not fit sliding_window {window}")
    first_full = config.get("max_window_layers")
    if window and isinstance(first_full, int) and first_full > 0:
        raise ValueError(
            f"max_window_layers {first_full} (windows in some layers) is not supported"
        )
    fields["sliding_window"] = window
    return {"sliding_window", "use_sliding_window", "layer_types", "max_window_layers"}


def _read_bias(config: Json, fields: Json) -> set[str]:
    if config["model_type"] == "qwen2":
        fields["attention_bias"] = True  # on q, k and v; there is no switch for it
        return set()
    if config.get("attention_bias"):
        raise ValueError("attention_bias true (a bias on o_proj too) is not supported yet")
    return {"attention_bias"}


def to_disk_name(name: str) -> str:
    """Our parameter's name in a file: Hugging Face keeps all but the head below `model.`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def from_disk_name(name: str) -> str | None:
    """Our name of a tensor in a file; None for the rotary tables that old files carry along."""
    return None if name.endswith("rotary_emb.inv_freq") else name.removeprefix("model.")
