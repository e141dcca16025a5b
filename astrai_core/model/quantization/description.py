"""How `config.json` says that a folder's weights are quantised.

    "quantization_config": {"quant_method": "astrai", "version": 1, "scheme": "w8a8"}

It is Hugging Face's own key, so that transformers refuses such a folder of a family's by the name
of the method instead of reading integers as weights. The tensors keep their names; beside each
quantised `X.weight` lies an `X.weight_scale`.
"""

from collections.abc import Mapping

from astrai_core.model.quantization.layers import SCHEMES, Scheme

_KEY = "quantization_config"
_METHOD = "astrai"
_VERSION = 1


def described_scheme(config: Mapping[str, object]) -> Scheme | None:
    """Return the scheme that a `config.json` names, or None where it names none of ours.

    Raises:
        ValueError: it names one that this version does not know.
    """
    entry = config.get(_KEY)
    if not isinstance(entry, dict) or entry.get("quant_method") != _METHOD:
        return None
    scheme, version = entry.get("scheme"), entry.get("version")
    if version != _VERSION:
        raise ValueError(f"{_KEY} has version {version!r}, known is {_VERSION}; upgrade AstrAI")
    for known in SCHEMES:
        if scheme == known:
            return known
    raise ValueError(f"{_KEY} has scheme {scheme!r}; known are {', '.join(SCHEMES)}")


def without_scheme(config: Mapping[str, object]) -> dict[str, object]:
    """What a `config.json` says of the architecture alone."""
    ours = described_scheme(config) is not None
    return {key: value for key, value in config.items() if not (ours and key == _KEY)}


def with_scheme(config: Mapping[str, object], scheme: Scheme | None) -> dict[str, object]:
    """Add to a `config.json` what its weights are, if they are quantised."""
    if scheme is None:
        return dict(config)
    return {**config, _KEY: {"quant_method": _METHOD, "version": _VERSION, "scheme": scheme}}
