"""The most likely token of each row, and whether the row can be believed."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from astrai_core.model.quantization import native

_SOURCE = Path(__file__).with_suffix(".cpp")


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Find the largest logit of each row (R, V).

    Returns:
        Its index (R,) in int64, the first among equals; and (R,) bool, whether it is finite and
        none of the row's logits is NaN.
    """
    if logits.device.type == "cpu" and logits.dtype is torch.float32 and _why_not() is None:
        return torch.ops.astrai_greedy.greedy(logits.contiguous())
    return logits.argmax(1), are_sound(logits)


def are_sound(logits: Tensor) -> Tensor:
    """Whether the largest logit of each row (R, V) is finite and none is NaN, (R,) bool."""
    return logits.amax(1).isfinite()  # the largest of a row is NaN if any of it is


@functools.cache
def _why_not() -> str | None:
    return native.why_not(_SOURCE)
