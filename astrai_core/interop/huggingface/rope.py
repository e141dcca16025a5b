"""Rotary frequencies in a `config.json`: `rope_parameters` of today, or the two keys before it."""

from astrai_core.interop.huggingface.json_values import Json, given, number, told

KEYS = {
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}

# each rule and its own numbers
_RULES: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
_LENGTH = "original_max_position_embeddings"


def read_rope(config: Json, fields: Json) -> set[str]:
    """Set `rope_theta` and `rope_scaling`; return the keys that were read.

    Raises:
        ValueError: a rule or a number of it that we do not compute.
    """
    parameters = _parameters(config)
    rule = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(rule, str) or rule not in _RULES:
        raise ValueError(f"rope_type {rule!r} is not supported; supported are {', '.join(_RULES)}")
    for where in (config, parameters):
        if given(where, "partial_rotary_factor", 1) != 1:
            value = where["partial_rotary_factor"]
            raise ValueError(f"partial_rotary_factor {value!r} is not supported; only 1 is")
    theta = given(parameters, "rope_theta", given(config, "rope_theta", 10000.0))
    fields["rope_theta"] = float(number(theta, "rope_theta"))
    scaling = {
        key: value
        for key, value in parameters.items()
        if key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        and (value is not None or key == "truncate")
    }
    if rule in ("llama3", "yarn"):
        trained = given(scaling, _LENGTH, config["max_position_embeddings"])
        trained = given(config, _LENGTH, trained)  # beside the others it counts more
        scaling.pop(_LENGTH, None)
        if rule == "yarn" and "factor" not in scaling:
            longest = number(config["max_position_embeddings"], "max_position_embeddings")
            scaling["factor"] = longest / number(trained, _LENGTH)
        scaling["original_max_len"] = trained
    elif given(config, _LENGTH) is not None:
        raise ValueError(f"{_LENGTH} says nothing in a rope of type {rule}")
    extra = sorted(scaling.keys() - _RULES[rule] - {"original_max_len"})
    if extra:
        raise ValueError(f"rope of type {rule}: {', '.join(extra)} is not understood")
    fields["rope_scaling"] = None if rule == "default" else {"rope_type": rule, **scaling}
    return KEYS


def _parameters(config: Json) -> Json:
    found = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    for parameters in found:
        if not isinstance(parameters, dict):
            raise ValueError(f"rope parameters {told(parameters)} are not understood")
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError("rope_scaling and rope_parameters contradict each other; keep one")
    return found[0] if found else {}  # pyright: ignore[reportReturnType] - checked above
