"""Whether an answer depends, to the last bit, on nothing but its own request.

Integer sums do not depend on their order, and our compiled attention, products of floats and fused
operators treat each token by itself. A library's product of floats does not: how it is summed
depends on how many rows it has, and so on the rest of the batch.
"""

import torch
from torch import nn

from astrai_core.model import Transformer
from astrai_core.model.fusion import (
    FusedBlock,
    FusedGQA,
    FusedMLP,
    FusedRMSNorm,
    fuse_,
    why_not_fused,
)
from astrai_core.model.layers import RMSNorm
from astrai_core.model.packed import PackedEmbedding, PackedLinear
from astrai_core.model.packed_experts import PackedMoE
from astrai_core.model.packed_latent import PackedMLA
from astrai_core.model.quantization import (
    Int4Linear,
    Int8Linear,
    QuantisedEmbedding,
    W8A8Linear,
    choose,
)
from astrai_core.model.rotary import TabulatedRotary
from astrai_core.model.rowwise import (
    RowwiseEmbedding,
    RowwiseLinear,
    RowwiseMLA,
    RowwiseMoE,
    RowwiseRouter,
    rowwise_,
    why_not_rowwise,
)
from astrai_serve.engine.native_attention import why_not_native

# RMSNorm: of heads, whose weight `FusedGQA` hands to an operator of ours
_ROWWISE = (
    nn.ModuleList, FusedBlock, FusedGQA, FusedMLP, FusedRMSNorm, RMSNorm, TabulatedRotary,
    PackedEmbedding, PackedLinear, PackedMLA, PackedMoE, W8A8Linear,
    RowwiseEmbedding, RowwiseLinear, RowwiseMLA, RowwiseMoE, RowwiseRouter,
)  # fmt: skip
_ROWWISE_IF_COMPILED = (Int4Linear, Int8Linear, QuantisedEmbedding)


def make_reproducible_(model: Transformer) -> None:
    """Let every layer compute row by row, in place.

    Raises:
        ValueError: it cannot be promised for this model on this machine; the message says why. The
            model still computes what it did.
    """
    reason = _why_not_here(model)
    if reason is None:
        fuse_(model)
        rowwise_(model)
        reason = _why_not_these(model)
    if reason is not None:
        raise ValueError(f"reproducible cannot be promised here: {reason}")


def _why_not_here(model: Transformer) -> str | None:
    if model.device.type != "cpu":
        return f"the model is on {model.device}, and only on a CPU is it known to hold"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"there are no operators for {model.dtype}; use --dtype float32 or bfloat16"
    for why_not in (why_not_native, why_not_fused, why_not_rowwise):
        if (reason := why_not()) is not None:
            return f"the compiled operators are not to be had: {reason}"
    return None


def _why_not_these(model: Transformer) -> str | None:
    for name, module in model.named_modules():
        if module is model or type(module) in _ROWWISE:
            continue
        if type(module) in _ROWWISE_IF_COMPILED:
            if choose().is_native:
                continue
            return f"{name}: {choose().reason}"
        return f"{name} is a {type(module).__name__}, whose sums may depend on the batch"
    return None
