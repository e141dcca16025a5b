"""Names of tensors in files, and what is left of a `config.json` when we write the folder anew."""

import re
from collections.abc import Mapping

from astrai_core.interop.huggingface.json_values import Json

# the number of layers that predict further tokens and stand behind the last one; its two names
_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")


def to_disk_name(name: str) -> str:
    """Our parameter's name in a file: Hugging Face keeps all but the head below `model.`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def from_disk_name(name: str) -> str | None:
    """Our name of a tensor in a file; None for the rotary tables that old files carry along."""
    return None if name.endswith("rotary_emb.inv_freq") else name.removeprefix("model.")


def layer_of(name: str) -> int | None:
    """Number of the block that a tensor of ours belongs to."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def further_layers(config: Mapping[str, object], n_layers: int) -> range:
    """Layers of a folder that only predict tokens further ahead, which nothing here asks for.

    DeepSeek-V3 trains them beside the model and publishes them as layers behind the last one; the
    model's own output does not depend on them.
    """
    counts = (config.get(key) for key in _FURTHER)
    return range(n_layers, n_layers + max(c if isinstance(c, int) else 0 for c in counts))


def saved_config(config: Mapping[str, object]) -> Json:
    """A foreign `config.json` for weights of ours: without the layers that were not read."""
    return {**config} | {key: 0 for key in _FURTHER if config.get(key)}
