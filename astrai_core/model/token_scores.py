"""Log-probabilities of labels from logits, and how they change with the logits.

On a CPU float32 and bfloat16 logits have kernels of ours (`token_scores.cpp`), which read a row
twice and write it once; elsewhere torch's operators do the same in more passes.

N rows of V logits.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from astrai_core.model.quantization import native

_SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def why_not_native() -> str | None:
    """What this machine lacks for our kernels, in words; None where they run."""
    return native.why_not(_SOURCE)


def score_labels(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Score labels, in float32 whatever the logits are in.

    Args:
        logits: (N, V), contiguous.
        labels: (N,), each from 0 to V - 1.
        temperature: divides the logits.

    Returns:
        The labels' log-probabilities and the logarithms of the sums of exponentials, (N,) each.
    """
    if _is_native(logits):
        logprobs = torch.empty(len(labels), dtype=torch.float32)
        totals = torch.empty_like(logprobs)
        torch.ops.astrai_scores.score(logits, labels, temperature, logprobs, totals)
        return logprobs, totals
    scaled = logits.float() / temperature
    totals = scaled.logsumexp(1)
    return scaled.gather(1, labels[:, None]).squeeze(1) - totals, totals


def slope_(
    logits: Tensor, labels: Tensor, temperature: float, totals: Tensor, gradient: Tensor
) -> Tensor:
    """Turn logits, in place, into the slope of `sum(gradient * logprobs)` with respect to them.

    Args:
        logits: as for `score_labels`.
        labels: the same.
        temperature: the same.
        totals: what `score_labels` returned second.
        gradient: (N,) float32.
    """
    if _is_native(logits):
        gradient = gradient.contiguous()
        torch.ops.astrai_scores.slope(logits, labels, temperature, totals, gradient)
        return logits
    slope = (logits.float() / temperature - totals[:, None]).exp_().neg_()
    slope.scatter_add_(1, labels[:, None], torch.ones_like(totals)[:, None])
    return logits.copy_(slope.mul_(gradient[:, None] / temperature))


def _is_native(logits: Tensor) -> bool:
    return (
        logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.bfloat16)
        and why_not_native() is None
    )
