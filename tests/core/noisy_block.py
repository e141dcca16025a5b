"""A block whose layers can be packed: of W8A8 weights that are not those a model begins with."""

from typing import Any

import torch

from astrai_core.model import ModelConfig, Transformer
from astrai_core.model.fusion import FusedBlock
from astrai_core.model.quantization import quantize_

SMALL: dict[str, Any] = {
    "vocab_size": 8, "dim": 96, "n_layers": 1, "dim_ffn": 32, "max_len": 8
}  # fmt: skip


def noisy_block(dtype=torch.float32, **shape):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL, **shape)).eval()
    # the bias of a router is a buffer
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data += torch.randn_like(tensor) * (0.5 if ".gate." in name else 0.1)
    quantize_(model.to(dtype), "w8a8")
    return FusedBlock(model.get_submodule("layers.0"))  # pyright: ignore[reportArgumentType]
