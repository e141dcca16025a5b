"""Who multiplies: the operators of quantised layers, and the kernels that can stand behind them.

    w8a8   y[n, o] = (sum_i xq[n, i] wq[o, i]) * w_scale[o] * x_scale[n]
    int8   y[n, o] = (sum_i x[n, i] wq[o, i]) * w_scale[o]
    int4   y[n, o] = sum_g (sum_{i in g} x[n, i] wq[o, i]) * w_scale[o, g]

The integer sum of w8a8 is exact, so a token's result depends neither on the order of summation nor
on the tokens computed beside it, and is the same whichever kernel is used. Several can, and which
is fast depends on the processor: those that are here and exact are found by trying.

N tokens, I inputs, O outputs, G groups of inputs.
"""

import functools
import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from astrai_core.model.quantization import native
from astrai_core.model.quantization.rounding import MAX, dequantize, quantize_rows, unpack

IntegerKernel = Callable[[Tensor, Tensor, int], Tensor]
"""Whole numbers (N, I) int8 and (O, I) int8 to their products (N, O) in float32."""

_packed_weights: dict[int, object] = {}
_handles = itertools.count()


def new_handle() -> int:
    """A number for the packed form of a weight: opaque, so that no compiled graph can hold it."""
    return next(_handles)


def forget(handle: int) -> None:
    """Free the packed form of a weight, if a kernel made one."""
    _packed_weights.pop(handle, None)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which kernels compute quantised layers in this process."""

    kernel: IntegerKernel
    """What multiplies integers where `is_native` is false."""
    is_native: bool
    """The compiled kernels are used, for all schemes."""
    reason: str
    """In words, for people."""


@functools.cache
def choose() -> Choice:
    """Prove and time the kernels there are, and use the fastest from now on.

    The compiled ones, where they can be had, else the best of torch's that is exact.
    """
    try:
        native.load()
        if is_exact(_native):
            native.adopt()
            reason = f"compiled for this processor ({native.instructions()}), proved exact"
            return Choice(kernel=_native, is_native=True, reason=reason)
        missing = "the compiled kernels are not exact here"
    except native.NativeError as error:
        missing = str(error)
    seconds = {name: _time(kernel) for name, kernel in TORCH_KERNELS.items() if is_exact(kernel)}
    name = min(seconds, key=seconds.__getitem__)
    reason = f"torch's {name}, the fastest exact one of {len(seconds)}, because {missing}"
    return Choice(kernel=TORCH_KERNELS[name], is_native=False, reason=reason)


def is_exact(kernel: IntegerKernel) -> bool:
    """Whether products agree with 64-bit arithmetic, on extremes above all."""
    # all-extreme rows make 16-bit intermediate sums saturate where a kernel has them, and every
    # width has another rest beside whole registers
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-MAX, MAX + 1, (11, 328), generator=generator, dtype=torch.int8)
    values[0], values[1], values[2, ::2], values[2, 1::2] = MAX, -MAX, MAX, -MAX
    values[3:, 0] = MAX
    return all(_is_exact(kernel, values[:, :width]) for width in (328, 320, 63, 48, 24, 8))


def _is_exact(kernel: IntegerKernel, values: Tensor) -> bool:
    values = values.contiguous()
    weight = torch.cat((values, -values))
    wanted = values.double() @ weight.double().t()
    handle = new_handle()
    try:
        results = {n: kernel(values[:n], weight, handle) for n in (1, 2, 3, 4, len(values))}
    except (RuntimeError, NotImplementedError, AttributeError):
        return False  # the operator does not exist for this processor
    finally:
        forget(handle)
    return all(torch.equal(result.double(), wanted[:n]) for n, result in results.items())


def _time(kernel: IntegerKernel) -> float:
    """Seconds for one row and for many, the shorter calls counting for more."""
    weight = torch.ones(768, 1024, dtype=torch.int8)
    handle = new_handle()
    total = 0.0
    for num_rows, share in ((1, 16), (32, 1)):
        values = torch.ones(num_rows, 1024, dtype=torch.int8)
        kernel(values, weight, handle)
        total += share * min(_seconds(kernel, values, weight, handle) for _ in range(3))
    forget(handle)
    return total


def _seconds(kernel: IntegerKernel, values: Tensor, weight: Tensor, handle: int) -> float:
    begin = time.perf_counter()
    kernel(values, weight, handle)
    return time.perf_counter() - begin


def _native(values: Tensor, weight: Tensor, handle: int) -> Tensor:
    # it quantises rows itself, and keeps whole numbers where a row's largest is 127
    return torch.ops.astrai_native.w8a8_linear(
        values.float(), weight, torch.ones(weight.shape[0]), handle
    )


def _onednn(values: Tensor, weight: Tensor, handle: int) -> Tensor:
    packed = _packed(handle, lambda: torch.ops.onednn.qlinear_prepack(weight, [1, weight.shape[1]]))
    ones = torch.ones(weight.shape[0])
    zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
    unsigned = (values.to(torch.int16) + 128).to(torch.uint8)  # the fast ones take no signed x
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _fbgemm(values: Tensor, weight: Tensor, handle: int) -> Tensor:
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        values.float(), 1.0, 128, _packed(handle, lambda: _pack_fbgemm(weight))
    )


def _fbgemm_by_halves(values: Tensor, weight: Tensor, handle: int) -> Tensor:
    # products of bytes are summed by twos in 16 bits there: exact while |x| is 64 at most
    low = values >> 1  # rounded down
    halves = torch.cat((low, values - low)).float()
    packed = _packed(handle, lambda: _pack_fbgemm(weight))
    both = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        halves, 1.0, 64, packed
    )
    return both[: len(values)] + both[len(values) :]


def _pack_fbgemm(weight: Tensor) -> object:
    ones = torch.ones(weight.shape[0], dtype=torch.float64)
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    with warnings.catch_warnings():
        # torch announces the end of these types; without them, this kernel is not there
        warnings.simplefilter("ignore", UserWarning)
        quantised = torch.quantize_per_channel(weight.float(), ones, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantised, None)


def _int_mm(values: Tensor, weight: Tensor, handle: int) -> Tensor:
    del handle
    return torch.ops.aten._int_mm(values, weight.t()).float()


TORCH_KERNELS: dict[str, IntegerKernel] = {
    "onednn.qlinear_pointwise": _onednn,
    "quantized.linear": _fbgemm,
    "quantized.linear on halves": _fbgemm_by_halves,
    "_int_mm": _int_mm,
}
"""Operators of torch's that multiply integers, some of them exactly, on some processors."""


def _packed(handle: int, pack: Callable[[], object]) -> object:
    if handle not in _packed_weights:
        _packed_weights[handle] = pack()
    return _packed_weights[handle]


def w8a8_linear(x: Tensor, weight: Tensor, scale: Tensor, handle: int) -> Tensor:
    """Multiply int8 by int8; see the head of this file.

    Args:
        x: (N, I).
        weight: (O, I) int8.
        scale: (O,) float32.
        handle: names the packed form of `weight`, made at the first call where a kernel needs one.

    Returns:
        (N, O) in the type of x.
    """
    values, x_scale = quantize_rows(x)
    total = choose().kernel(values, weight, handle)  # (N, O), whole numbers
    return (total * scale * x_scale).to(x.dtype)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply x (N, I) by (O, I) int8 with scales (O,)."""
    return (F.linear(x.float(), weight.float()) * scale).to(x.dtype)


def int4_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply x (N, I) by packed (O, I / 2) with scales (O, G)."""
    return F.linear(x.float(), dequantize(unpack(weight), scale)).to(x.dtype)


_LIBRARY = torch.library.Library("astrai", "FRAGMENT")


def _define(signature: str, function: Callable[..., Tensor]) -> None:
    """Make an operator that compiled graphs can hold and gradients pass through."""
    name = signature.partition("(")[0]
    _LIBRARY.define(signature)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    qualified = f"astrai::{name}"
    torch.library.register_fake(qualified, _shape_of_output, lib=_LIBRARY)
    torch.library.register_autograd(qualified, _backward, setup_context=_keep, lib=_LIBRARY)


def _shape_of_output(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """For adapters on a frozen base: the gradient as if nothing had been rounded but the weight."""
    weight, scale = ctx.saved_tensors
    whole = dequantize(unpack(weight) if weight.dtype == torch.uint8 else weight, scale)
    of_x = (grad.float() @ whole).to(grad.dtype)
    return (of_x, *[None] * (ctx.num_inputs - 1))


_define("w8a8_linear(Tensor x, Tensor weight, Tensor scale, int handle) -> Tensor", w8a8_linear)
_define("int8_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor", int8_linear)
_define("int4_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor", int4_linear)
