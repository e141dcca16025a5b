"""Quantised layers take the place of a model's own at inference; the forward stays the same.

N tokens, I inputs, O outputs, G groups of inputs.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from astrai_core.model.layers import Embedding, Linear
from astrai_core.model.quantization import kernels
from astrai_core.model.quantization.rounding import (
    dequantize,
    quantize_groups,
    quantize_rows,
    unpack,
)

Scheme = Literal["w8a8", "int8", "int4"]
"""int8 weights and int8 activations; int8 weights alone; int4 weights alone, in groups."""

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


class _Quantised(nn.Module):
    """A matrix of small integers beside its scales, float32 whatever the model becomes."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Round a matrix (O, I) to what `weight` and `weight_scale` hold."""
        values, scale = quantize_rows(weight.detach())
        return values, scale[:, 0].contiguous()

    def dequantize(self) -> Tensor:
        """The matrix (O, I) that the integers stand for, in float32."""
        is_packed = self.weight.dtype == torch.uint8
        return dequantize(unpack(self.weight) if is_packed else self.weight, self.weight_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


class _QuantisedLinear(_Quantised):
    """Takes the place of a `Linear`."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None):
        super().__init__(weight, weight_scale)
        self.out_features = weight.shape[0]
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: Linear) -> Self:
        """Quantise a layer's weight; its bias stays as it is."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(*cls.quantize(linear.weight), bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O) in the type of x."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # (N, I)
        out = self._multiply(rows).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _multiply(self, rows: Tensor) -> Tensor:
        raise NotImplementedError


def _handle_of(layer: nn.Module) -> int:
    """A number for the packed form of the layer's weight, which goes when the layer does."""
    handle = kernels.new_handle()
    weakref.finalize(layer, kernels.forget, handle).atexit = False
    return handle


class W8A8Linear(_QuantisedLinear):
    """Weights in int8 for each output channel, activations in int8 for each token."""

    scheme = "w8a8"

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None):
        super().__init__(weight, weight_scale, bias)
        self.in_features = weight.shape[1]
        self.handle = _handle_of(self)

    def _multiply(self, rows: Tensor) -> Tensor:
        return torch.ops.astrai.w8a8_linear(rows, self.weight, self.weight_scale, self.handle)


class Int8Linear(_QuantisedLinear):
    """Weights in int8 for each output channel, activations as they are."""

    scheme = "int8"

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None):
        super().__init__(weight, weight_scale, bias)
        self.in_features = weight.shape[1]

    def _multiply(self, rows: Tensor) -> Tensor:
        return torch.ops.astrai.int8_linear(rows, self.weight, self.weight_scale)


class Int4Linear(_QuantisedLinear):
    """Weights in int4, two in a byte, a scale for each group of inputs; activations as they are."""

    scheme = "int4"

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None):
        super().__init__(weight, weight_scale, bias)
        self.in_features = 2 * weight.shape[1]

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Round (O, I) to bytes (O, I / 2) and scales (O, G)."""
        return quantize_groups(weight.detach())

    def _multiply(self, rows: Tensor) -> Tensor:
        return torch.ops.astrai.int4_linear(rows, self.weight, self.weight_scale)


class QuantisedEmbedding(_Quantised):
    """Takes the place of an `Embedding`: int8 for each token, looked up and multiplied by.

    Args:
        weight: (V, dim) int8, V tokens of the vocabulary.
        weight_scale: (V,) float32.
        rounds_inputs: as an output layer it is a `W8A8Linear`, else an `Int8Linear`.
    """

    def __init__(self, weight: Tensor, weight_scale: Tensor, *, rounds_inputs: bool):
        super().__init__(weight, weight_scale)
        self.rounds_inputs = rounds_inputs
        self._handle = _handle_of(self) if rounds_inputs else None

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to (..., dim) in float32."""
        return self.weight[ids].float() * self.weight_scale[ids][..., None]

    def project(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., V), as the output layer of a model that ties the two."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if self._handle is None:
            out = torch.ops.astrai.int8_linear(rows, self.weight, self.weight_scale)
        else:
            out = torch.ops.astrai.w8a8_linear(rows, self.weight, self.weight_scale, self._handle)
        return out.view(*x.shape[:-1], self.weight.shape[0])


_LINEAR: dict[Scheme, type[_QuantisedLinear]] = {
    "w8a8": W8A8Linear,
    "int8": Int8Linear,
    "int4": Int4Linear,
}


def quantize_(model: nn.Module, scheme: Scheme = "w8a8") -> nn.Module:
    """Replace every `Linear` below `model`, and the embedding, by its quantised form, in place.

    The output layer is int8 in each scheme: every token's choice passes through it. Norms, a
    router's and MLA's small `kv_b_proj`, which is folded into the queries, stay as they are.

    Raises:
        ValueError: a layer's shape does not suit the scheme; the message names the layer.
    """
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, Embedding):
                pair = QuantisedEmbedding.quantize(child.weight)
                setattr(owner, name, QuantisedEmbedding(*pair, rounds_inputs=scheme == "w8a8"))
            elif isinstance(child, Linear) and name != "kv_b_proj":
                is_int4_head = name == "lm_head" and scheme == "int4"
                form = Int8Linear if is_int4_head else _LINEAR[scheme]
                try:
                    setattr(owner, name, form.from_linear(child))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
    return model


def scheme_of(model: nn.Module) -> Scheme | None:
    """Return the scheme that a model's layers were quantised by, or None if they were not."""
    found = {getattr(module, "scheme", None) for module in model.modules()}
    # int8 is an output layer's form under int4 too
    return next((scheme for scheme in ("w8a8", "int4", "int8") if scheme in found), None)


def quantised_tensors(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Round those named tensors, one by one, that `model` holds in quantised form.

    Args:
        model: quantised, perhaps on the meta device.
        tensors: weights under the names that the model had before it was quantised.
    """
    forms = {name: m for name, m in model.named_modules() if isinstance(m, _Quantised)}
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in forms:
            values, scale = forms[owner].quantize(tensor)
            yield name, values
            yield f"{name}_scale", scale
        else:
            yield name, tensor
