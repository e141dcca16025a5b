"""W8A8 layers in the order in which AVX512-VNNI reads them, and a block in three operators.

Packing takes the place of a layer's weight, so memory stays what it was. The products are the same
integers as those of `W8A8Linear`; what is fused around them is said in `packed.cpp`.

N tokens, O outputs, I inputs, P panels of 64 outputs, S steps of 4 inputs.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from astrai_core.model.quantization import QuantisedEmbedding, W8A8Linear, native

_SOURCE = Path(__file__).with_name("packed.cpp")


class PackedLinear(nn.Module):
    """A `W8A8Linear` whose weight lies in panels.

    Args:
        weight: (O, I) int8; or several, whose outputs come one after the other.
        weight_scale: (O,) float32.
        bias: (O,), if there is one.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    scheme = "w8a8"

    def __init__(
        self,
        weight: Tensor | Sequence[Tensor],
        weight_scale: Tensor,
        bias: Tensor | None = None,
    ):
        super().__init__()
        weights = [weight] if isinstance(weight, Tensor) else weight
        self.out_features, self.in_features = len(weight_scale), weights[0].shape[1]
        packed = torch.ops.astrai_packed.pack([one.contiguous() for one in weights])
        self.register_buffer("weight", packed)
        self.register_buffer("weight_scale", weight_scale.clone())
        self.register_buffer("bias", None if bias is None else bias.clone())
        self.is_output = False  # whose numbers are looked at one by one: they stay float32

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O) in the type of x, or in float32 as logits."""
        rows = x.reshape(-1, self.in_features).contiguous()
        if self.is_output:
            rows = rows.float()
        out = torch.ops.astrai_packed.linear(rows, self.weight, self.weight_scale)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class PackedEmbedding(nn.Module):
    """A `QuantisedEmbedding` whose rows lie in panels, looked up and multiplied by."""

    def __init__(self, weight: Tensor, weight_scale: Tensor):
        super().__init__()
        self.output = PackedLinear(weight, weight_scale)
        self.output.is_output = True
        self.weight = self.output.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to (..., I) in float32."""
        layer = self.output
        found = torch.ops.astrai_packed.lookup(
            ids.reshape(-1).contiguous(), layer.weight, layer.weight_scale, layer.in_features
        )
        return found.view(*ids.shape, layer.in_features)

    def project(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O), as the output layer of a model that ties the two."""
        return self.output(x)


@functools.cache
def why_not_packed() -> str | None:
    """What this machine lacks for packed weights, in words; None where they run."""
    if not torch.cpu.get_capabilities().get("avx512_vnni"):
        return "the processor has no AVX512-VNNI"
    if (lacking := native.why_not(_SOURCE)) is not None:
        return lacking
    return None if _is_exact() else "the packed products are not exact here"


def _is_exact() -> bool:
    """Whether packed products agree with 64-bit arithmetic, extremes and odd shapes included."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (13, 329), generator=generator)
    values[0], values[1], values[2, ::2], values[2, 1::2] = 127, -127, 127, -127
    values[3:, 0] = 127  # a row is rounded by its largest: these stay whole
    weight = torch.cat((values, -values, values, -values, values, -values))
    packed = torch.ops.astrai_packed.pack([weight.to(torch.int8)])
    ones = torch.ones(len(weight))
    return all(
        torch.equal(
            torch.ops.astrai_packed.linear(values[:n].float(), packed, ones).long(),
            values[:n] @ weight.t(),
        )
        for n in (1, 2, 3, 4, 5, 6, 13)
    )


def pack_(model: nn.Module) -> None:
    """Pack every W8A8 layer below `model`, in place."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is W8A8Linear:
                packed = PackedLinear(child.weight, child.weight_scale, child.bias)
                packed.is_output = name == "lm_head"
            elif type(child) is QuantisedEmbedding and child.rounds_inputs:
                packed = PackedEmbedding(child.weight, child.weight_scale)
            else:
                continue
            setattr(owner, name, packed)
