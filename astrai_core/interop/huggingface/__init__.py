"""Hugging Face folders: what their `config.json` means in our fields, and the tensors' names.

Plain dicts and names only; nothing here knows the model. A key that would change the result and
that we do not know is refused by name, never skipped.
"""

from astrai_core.interop.huggingface.families import FAMILIES, to_fields
from astrai_core.interop.huggingface.names import (
    from_disk_name,
    further_layers,
    layer_of,
    saved_config,
    to_disk_name,
)

__all__ = [
    "FAMILIES",
    "from_disk_name",
    "further_layers",
    "layer_of",
    "saved_config",
    "to_disk_name",
    "to_fields",
]
