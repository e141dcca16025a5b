"""Parts of a block that families say in ways of their own: biases, windows and experts."""

from astrai_core.interop.huggingface.json_values import Json, count, given, told


def read_attention_bias(config: Json, fields: Json) -> set[str]:
    """Read `attention_bias`, which is for the projections into attention and for the one out."""
    fields["attention_bias"] = fields["attention_output_bias"] = given(
        config, "attention_bias", False
    )
    return {"attention_bias"}


def read_window(config: Json, fields: Json) -> set[str]:
    """Read a sliding window that is for all blocks or for none."""
    is_used = given(config, "use_sliding_window", config["model_type"] == "mistral")
    fields["sliding_window"] = config["sliding_window"] if is_used else None
    kinds = given(config, "layer_types", [])
    kind = "sliding_attention" if fields["sliding_window"] else "full_attention"
    if not isinstance(kinds, list) or any(k != kind for k in kinds):
        raise ValueError(f"layer_types {told(kinds)} is not supported; all blocks are {kind}")
    if is_used and given(config, "max_window_layers") is not None:
        raise ValueError(
            f"max_window_layers {config['max_window_layers']!r} is not supported: the window is "
            "for all blocks"
        )
    return {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


def read_layer_windows(config: Json, fields: Json) -> set[str]:
    """Read a sliding window that is for the blocks that `layer_types` or `max_window_layers` name.

    Raises:
        ValueError: they name kinds of blocks that we do not have.
    """
    keys = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
    n_layers = count(config["num_hidden_layers"], "num_hidden_layers")
    window = config["sliding_window"] if given(config, "use_sliding_window", False) else None
    kinds = given(config, "layer_types")
    if kinds is None:
        first = count(config["max_window_layers"], "max_window_layers")
        blocks = list(range(first, n_layers)) if window else []
    elif isinstance(kinds, list) and len(kinds) == n_layers:
        unknown = set(map(str, kinds)) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(f"layer_types {', '.join(sorted(unknown))} are not supported")
        blocks = [n for n, kind in enumerate(kinds) if kind == "sliding_attention"]
    else:
        raise ValueError(f"layer_types {told(kinds)} does not name {n_layers} blocks")
    if blocks and window is None:
        raise ValueError("layer_types has sliding_attention, but there is no sliding_window")
    fields["sliding_window"] = window if blocks else None
    fields["sliding_window_layers"] = blocks if 0 < len(blocks) < n_layers else None
    return keys


def read_qwen_experts(config: Json, fields: Json) -> set[str]:
    """Read Qwen3-MoE's experts: none shared, chosen by softmax.

    Raises:
        ValueError: the blocks without experts are not the first ones.
    """
    keys = {
        "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
        "norm_topk_prob", "mlp_only_layers",
    }  # fmt: skip
    counts = [config[key] for key in ("num_experts", "num_local_experts") if key in config]
    if not counts or any(one != counts[0] for one in counts):
        raise ValueError(f"num_experts must be one number, not {counts}")
    dense = given(config, "mlp_only_layers", [])
    if not isinstance(dense, list) or sorted(dense) != list(range(len(dense))):
        raise ValueError(
            f"mlp_only_layers {told(dense)} is not supported: blocks without experts must be the "
            "first ones"
        )
    experts: Json = {
        "n_routed_experts": counts[0],
        "n_activated_experts": config["num_experts_per_tok"],
        "dim_ffn_expert": config["moe_intermediate_size"],
        "norm_topk_prob": given(config, "norm_topk_prob", False),
    }
    _set_experts(config, fields, experts, len(dense))
    return keys


def read_deepseek_experts(config: Json, fields: Json) -> set[str]:
    """Read the experts of DeepSeek-V2 and V3, routed in groups or not."""
    method = config["topk_method"]
    groups: Json = {"n_expert_groups": 1, "n_activated_groups": 1}
    if method != "greedy":
        groups = {
            "n_expert_groups": given(config, "n_group", 1),
            "n_activated_groups": given(config, "topk_group", 1),
        }
    experts: Json = {
        "n_routed_experts": given(config, "n_routed_experts", 0),
        "n_shared_experts": given(config, "n_shared_experts", 0),
        "n_activated_experts": config["num_experts_per_tok"],
        "dim_ffn_expert": config["moe_intermediate_size"],
        "routed_scaling_factor": given(config, "routed_scaling_factor", 1.0),
        "moe_topk_method": method,
        "norm_topk_prob": fields.pop("norm_topk_prob", False),
        "moe_scoring": fields.pop("moe_scoring"),
        **groups,
    }
    first_dense = count(given(config, "first_k_dense_replace", 0), "first_k_dense_replace")
    _set_experts(config, fields, experts, first_dense)
    return {
        "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
        "routed_scaling_factor", "n_group", "topk_group", "first_k_dense_replace",
    }  # fmt: skip


def _set_experts(config: Json, fields: Json, experts: Json, first_dense: int) -> None:
    """A model of dense blocks alone has no experts, whatever the file says of them."""
    n_layers = count(config["num_hidden_layers"], "num_hidden_layers")
    if first_dense < n_layers and experts["n_routed_experts"]:
        fields |= {"ffn_type": "moe", "first_k_dense": first_dense, **experts}
