"""The log-probability of each token, with its gradient and without all logits at once.

N scored positions; dim is the model's width, vocab the rows of its output matrix.

What a reader would get wrong: the backward pass computes the logits again. To keep them would take
N x vocab numbers, more than the model has for a large vocabulary; to compute them again takes a
third of the output layer's time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from astrai_train.losses.likelihood import IGNORED

_CHUNK = 512
"""Rows of logits that exist at a time; see `likelihood`."""


def token_logprobs(
    hidden_states: Tensor, output_weight: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Score the labels, in float32.

    Positions that are not trained are dropped before they are projected to the vocabulary.

    Args:
        hidden_states: what the model sees at each position, (..., dim).
        output_weight: the output layer's matrix, (vocab, dim).
        labels: the token that follows each position, (...), or `IGNORED`.
        temperature: divides the logits, as it does where tokens are sampled.

    Returns:
        Log-probabilities, shaped like `labels`; 0 where a label is ignored. Without any label the
        gradients are 0.
    """
    flat = labels.flatten()
    scored = (flat != IGNORED).nonzero().squeeze(1)  # (N,)
    hidden = hidden_states.flatten(0, -2)[scored]
    device = hidden.device.type
    dtype = output_weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    logprobs = _Scored.apply(hidden, output_weight, flat[scored], temperature, dtype)
    assert isinstance(logprobs, Tensor)
    empty = torch.zeros(flat.shape, dtype=logprobs.dtype, device=flat.device)
    return empty.index_put((scored,), logprobs).view(labels.shape)


class _Scored(torch.autograd.Function):
    """(N, dim), (vocab, dim), (N,) -> (N,), in chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        dtype: torch.dtype,
    ) -> Tensor:
        matrix = weight.to(dtype)
        chosen = torch.empty(len(labels), dtype=torch.float32, device=labels.device)
        totals = torch.empty_like(chosen)
        for rows in _chunks(len(labels)):
            logits = _logits(hidden[rows], matrix, temperature)
            totals[rows] = logits.logsumexp(1)
            chosen[rows] = logits.gather(1, labels[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, labels, totals)
        ctx.temperature, ctx.dtype = temperature, dtype
        return chosen - totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, labels, totals = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(ctx.dtype)
        hidden_gradient = torch.zeros_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for rows in _chunks(len(labels)):
            # d logprob / d logits = (one at the label) - probabilities, over the temperature
            logits = _logits(hidden[rows], matrix, ctx.temperature)
            slope = (logits - totals[rows, None]).exp_().mul_(-gradient[rows, None])
            slope.scatter_add_(1, labels[rows, None], gradient[rows, None])
            slope = slope.div_(ctx.temperature).to(ctx.dtype)
            if hidden_gradient is not None:
                hidden_gradient[rows] = (slope @ matrix).to(hidden.dtype)
            if weight_gradient is not None:
                weight_gradient += (slope.T @ hidden[rows].to(ctx.dtype)).float()
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        return hidden_gradient, weight_gradient, None, None, None


def _chunks(length: int) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, length, _CHUNK)]


def _logits(hidden: Tensor, matrix: Tensor, temperature: float) -> Tensor:
    """In float32, the matrix product itself in the matrix's type."""
    logits = (hidden.to(matrix.dtype) @ matrix.T).float()
    return logits if temperature == 1.0 else logits.div_(temperature)
