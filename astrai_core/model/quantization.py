"""W8A8: weights in int8 for each output channel, activations in int8 for each token.

    y[n, o] = (sum_i xq[n, i] wq[o, i]) * x_scale[n] * w_scale[o]

The sum is exact in int32, so a token's result depends neither on the order of summation nor on the
tokens computed beside it. The integer kernels stand behind this one file, because torch has
announced the end of its quantised dtypes; whichever is used was proved exact on extreme values.

N tokens, I inputs, O outputs.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from astrai_core.model.layers import Linear

_MAX = 127  # symmetric: -128 is never used
_ZERO_POINT = 128  # oneDNN's fast kernels take unsigned activations only

_packed_weights: dict[int, Tensor] = {}
_handles = itertools.count()


class W8A8Linear(nn.Module):
    """Takes the place of a `Linear` at inference."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)  # (O, I) int8
        self.register_buffer("weight_scale", weight_scale)  # (O,) float32
        self.register_buffer("bias", bias)
        # a packed weight is an opaque tensor, which a compiled graph cannot hold: it holds a number
        self._handle = next(_handles)

    @classmethod
    def from_linear(cls, linear: Linear) -> "W8A8Linear":
        """Quantise a layer's weight, each output channel by its own largest value."""
        weight, scale = quantize_rows(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.detach().float()
        return cls(weight, scale[:, 0], bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O) in the type of x."""
        rows = x.reshape(-1, x.shape[-1])  # (N, I)
        out = torch.ops.astrai.w8a8_linear(rows, self.weight, self.weight_scale, self._handle)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def __del__(self) -> None:
        _packed_weights.pop(self.__dict__.get("_handle", -1), None)


def quantize_(model: nn.Module) -> nn.Module:
    """Replace every `Linear` below `model` by its `W8A8Linear`, in place."""
    for name, child in model.named_children():
        if name == "kv_b_proj":
            continue  # MLA folds this small matrix into its queries, so it is never multiplied by
        if isinstance(child, Linear):
            setattr(model, name, W8A8Linear.from_linear(child))
        else:
            quantize_(child)
    return model


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of (R, I) to int8 by its largest absolute value.

    Returns:
        The int8 values (R, I) and the scale of each row (R, 1) in float32; `values * scale` is
        within half a scale of x. A row of zeros has scale 1.
    """
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True) / _MAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / scale).round().clamp(-_MAX, _MAX).to(torch.int8), scale


def w8a8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, handle: int) -> Tensor:
    """Multiply by a quantised weight; see the head of this file.

    Args:
        x: (N, I).
        weight: (O, I) int8.
        weight_scale: (O,) float32.
        handle: names the packed form of `weight`, made at the first call.

    Returns:
        (N, O) in the type of x.
    """
    values, scale = quantize_rows(x)
    total = integer_kernel()(values, weight, handle)  # (N, O), whole numbers
    return (total * scale * weight_scale).to(x.dtype)


@functools.cache
def integer_kernel() -> Callable[[Tensor, Tensor, int], Tensor]:
    """The fastest kernel that multiplies integers exactly on this machine.

    oneDNN's where it passes the proof (it needs 8-bit dot products that do not saturate), else
    `torch._int_mm`, which is exact everywhere and slower.
    """
    return _onednn if _is_exact(_onednn) else _int_mm


def _is_exact(kernel: Callable[[Tensor, Tensor, int], Tensor]) -> bool:
    # all-extreme rows make 16-bit intermediate sums saturate where a kernel has them
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-_MAX, _MAX + 1, (5, 256), generator=generator, dtype=torch.int8)
    values[0], values[1], values[2, ::2], values[2, 1::2] = _MAX, -_MAX, _MAX, -_MAX
    weight = torch.cat((values, -values))
    handle = next(_handles)
    try:
        result = kernel(values, weight, handle)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False  # the operator does not exist for this processor
    finally:
        _packed_weights.pop(handle, None)
    return torch.equal(result.double(), values.double() @ weight.double().t())


def _onednn(values: Tensor, weight: Tensor, handle: int) -> Tensor:
    packed = _packed_weights.get(handle)
    if packed is None:
        packed = torch.ops.onednn.qlinear_prepack(weight, [1, weight.shape[1]])
        _packed_weights[handle] = packed
    ones = torch.ones(weight.shape[0])
    zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
    unsigned = (values.to(torch.int16) + _ZERO_POINT).to(torch.uint8)
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, _ZERO_POINT, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _int_mm(values: Tensor, weight: Tensor, handle: int) -> Tensor:
    del handle
    return torch.ops.aten._int_mm(values, weight.t()).float()


_LIBRARY = torch.library.Library("astrai", "FRAGMENT")
_LIBRARY.define("w8a8_linear(Tensor x, Tensor weight, Tensor weight_scale, int handle) -> Tensor")
_LIBRARY.impl("w8a8_linear", w8a8_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("astrai::w8a8_linear", lib=_LIBRARY)
def _shape_of_output(x: Tensor, weight: Tensor, weight_scale: Tensor, handle: int) -> Tensor:
    del weight_scale, handle
    return x.new_empty(x.shape[0], weight.shape[0])
