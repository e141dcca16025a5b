"""A folder's model as it computes answers: layers fused, int8 weights packed as they are read."""

from pathlib import Path

import torch

from astrai_core.model.allocator import large_blocks_returned
from astrai_core.model.auto import AutoModel
from astrai_core.model.fusion import fuse_
from astrai_core.model.lora import merge_lora
from astrai_core.model.packed import why_not_packed
from astrai_core.model.quantization import Int8Linear, QuantisedEmbedding, Scheme, W8A8Linear
from astrai_core.model.transformer import Transformer


def read_fused(
    folder: str | Path, dtype: torch.dtype | None = None, scheme: Scheme | None = None
) -> Transformer:
    """Load a model folder and fuse what can be fused; an adapter is merged into its base.

    Packing copies a matrix anyhow, so it is taken from the file: memory is written once, and holds
    the weights and no more.

    Args:
        folder: as of `AutoModel.from_pretrained`.
        dtype: likewise.
        scheme: likewise.

    Raises:
        ValueError: the folder cannot be loaded; the message says why.
    """
    with large_blocks_returned():
        model = AutoModel.from_pretrained(
            folder, dtype, scheme, maps_bytes=why_not_packed() is None
        )
        merge_lora(model)
        fuse_(model)
        for module in model.modules():  # what was not packed must not hang on a file
            if isinstance(module, W8A8Linear | Int8Linear | QuantisedEmbedding):
                module.weight = module.weight.clone()
        return model
