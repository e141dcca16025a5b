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

from astrai_core.model.token_scores import score_labels, slope_
from astrai_train.losses.likelihood import IGNORED
from astrai_train.losses.projection import (
    OutputGradients,
    blocks,
    chunks,
    logit_buffer,
    product_dtype,
)


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
    dtype = product_dtype(hidden, output_weight)
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
        states, matrix = hidden.to(dtype), weight.to(dtype)
        logprobs = torch.empty(len(labels), dtype=torch.float32, device=labels.device)
        totals = torch.empty_like(logprobs)
        for rows in chunks(0, len(labels)):
            logits = states[rows] @ matrix.T
            logprobs[rows], totals[rows] = score_labels(logits, labels[rows], temperature)
        ctx.save_for_backward(hidden, weight, labels, totals)
        ctx.temperature, ctx.dtype = temperature, dtype
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, labels, totals = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        states, matrix = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        gradients = OutputGradients(
            states, matrix, wants_hidden=wants_hidden, wants_weight=wants_weight
        )
        buffer = logit_buffer(len(labels), matrix)
        for block in blocks(len(labels), matrix):
            for rows in chunks(block.start, block.stop):
                logits = buffer[rows.start - block.start : rows.stop - block.start]
                torch.mm(states[rows], matrix.T, out=logits)
                slope_(logits, labels[rows], ctx.temperature, totals[rows], gradient[rows])
                gradients.add_chunk(rows, logits)
            gradients.add_block(block, buffer[: block.stop - block.start])
        of_hidden = None if gradients.hidden is None else gradients.hidden.to(hidden.dtype)
        return of_hidden, gradients.weight_like(weight), None, None, None
