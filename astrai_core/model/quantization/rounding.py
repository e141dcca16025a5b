"""Numbers to small integers with scales, and back. Pure functions on tensors.

R rows, I inputs; G groups of neighbouring inputs in a row, which share a scale.
"""

import torch
from torch import Tensor

MAX = 127  # symmetric: -128 is never used
_GROUPS = (64, 32, 16)  # of a row's inputs, the first that divides them
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of (R, I) to int8 by its largest absolute value.

    Returns:
        The int8 values (R, I) and the scale of each row (R, 1) in float32; `values * scale` is
        within half a scale of x. A row of zeros has scale 1.
    """
    if x.is_meta:  # torch's stand-ins for arithmetic there import its compiler: a second and 90 MB
        return _empty(x, (x.shape[0], x.shape[1]), torch.int8), _empty(x, (x.shape[0], 1))
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True) / MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # one that is no number stays so
    return (x / scale).round().clamp(-MAX, MAX).to(torch.int8), scale


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise (R, I) to four bits, each group by the scale with the least squared error.

    The largest value of a group becomes -8 or a little beyond the end of the range [-8, 7]: one
    value of many is then clipped, and all others have finer steps.

    Returns:
        Two values in each byte (R, I / 2), as `unpack` undoes it, and scales (R, G) in float32.

    Raises:
        ValueError: I is not a multiple of 16.
    """
    size = group_size(x.shape[1])
    if x.is_meta:
        rows, inputs = x.shape
        return _empty(x, (rows, inputs // 2), torch.uint8), _empty(x, (rows, inputs // size))
    grouped = x.float().unflatten(1, (-1, size))  # (R, G, size)
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))  # with its sign
    largest = torch.where(largest == 0, torch.full_like(largest, -8), largest)
    best, least = largest / -8, torch.full_like(largest, torch.inf)
    for shrink in _SHRINKS:
        scale = largest / -8 * shrink
        error = (_round(grouped, scale) * scale - grouped).square().sum(2, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    values = (_round(grouped, best) + 8).to(torch.uint8).flatten(1)
    return values[:, 0::2] | values[:, 1::2] << 4, best[:, :, 0].contiguous()


def _empty(x: Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _round(grouped: Tensor, scale: Tensor) -> Tensor:
    return (grouped / scale).round().clamp(-8, 7)


def group_size(num_inputs: int) -> int:
    """How many neighbouring inputs share a four-bit scale.

    Raises:
        ValueError: the inputs are not a multiple of 16.
    """
    for size in _GROUPS:
        if num_inputs % size == 0:
            return size
    raise ValueError(f"int4 needs layers whose inputs are a multiple of 16, not {num_inputs}")


def unpack(packed: Tensor) -> Tensor:
    """Undo the packing of `quantize_groups`: bytes (R, I / 2) to values from -8 to 7 (R, I)."""
    both = torch.stack((packed & 15, packed >> 4), dim=2)
    return both.flatten(1).to(torch.int8) - 8


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """Multiply values (R, I) by scales (R, G) or (R,), in float32."""
    grouped = values.float().unflatten(1, (scale[0].numel(), -1))
    return (grouped * scale.view(len(scale), -1, 1)).flatten(1)
