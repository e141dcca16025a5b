"""The likelihood of tokens.

N positions; dim is the model's width, vocab the rows of its output matrix.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from astrai_core.model.token_scores import score_labels, slope_
from astrai_train.losses.projection import (
    OutputGradients,
    blocks,
    chunks,
    logit_buffer,
    product_dtype,
)

IGNORED = -100
"""Label of a position that is not trained."""


def cross_entropy(
    hidden_states: Tensor, output_weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihoods of the labels, in float32.

    Positions that are not trained are dropped before they are projected to the vocabulary.

    Args:
        hidden_states: what the model sees at each position, (..., dim).
        output_weight: the output layer's matrix, (vocab, dim).
        labels: the token that follows each position, (...), or `IGNORED`.

    Returns:
        The sum in nats and the number of trained positions, both without a dimension. Without any
        trained position the sum is 0 and its gradients are 0.
    """
    nats, _, count = smoothed_cross_entropy(hidden_states, output_weight, labels, 0.0)
    return nats, count


def smoothed_cross_entropy(
    hidden_states: Tensor, output_weight: Tensor, labels: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the cross-entropies with smoothed targets, and without, in float32.

    A target has `1 - smoothing` on its label and the rest spread evenly over the vocabulary, the
    label included. That adds `smoothing * (logit of the label - mean logit)` to a position's loss,
    and the mean of the logits is the logit of the mean row: no logits are needed for it.

    Args:
        hidden_states: what the model sees at each position, (..., dim).
        output_weight: the output layer's matrix, (vocab, dim).
        labels: the token that follows each position, (...), or `IGNORED`.
        smoothing: share of the target that is spread, from 0 to below 1.

    Returns:
        The smoothed sum, the sum of the negative log-likelihoods without a gradient, and the
        number of trained positions.
    """
    flat = labels.flatten()
    trained = (flat != IGNORED).nonzero().squeeze(1)  # (N,)
    hidden, wanted = hidden_states.flatten(0, -2)[trained], flat[trained]
    nats = _Summed.apply(
        hidden, output_weight, wanted, product_dtype(hidden, output_weight), torch.is_grad_enabled()
    )
    assert isinstance(nats, Tensor)
    total = nats
    if smoothing:
        rows = F.embedding(wanted, output_weight) - output_weight.mean(0)  # (N, dim)
        total = nats + smoothing * (hidden.float() * rows.float()).sum()
    return total, nats.detach(), (flat != IGNORED).sum()


class _Summed(torch.autograd.Function):
    """(N, dim), (vocab, dim), (N,) -> the sum of negative log-likelihoods.

    What a sum's gradient is known without what comes after it, but for a factor: so the forward
    pass works out the gradients from the logits it has, and no logits are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        has_gradient: bool,
    ) -> Tensor:
        states, matrix = hidden.to(dtype), weight.to(dtype)
        wants_hidden, wants_weight = (has_gradient and one for one in ctx.needs_input_grad[:2])
        gradients = OutputGradients(
            states, matrix, wants_hidden=wants_hidden, wants_weight=wants_weight
        )
        buffer = logit_buffer(len(labels), matrix)
        logprobs = torch.empty(len(labels), dtype=torch.float32, device=labels.device)
        downwards = torch.full_like(logprobs, -1.0)
        for block in blocks(len(labels), matrix):
            for rows in chunks(block.start, block.stop):
                logits = buffer[rows.start - block.start : rows.stop - block.start]
                torch.mm(states[rows], matrix.T, out=logits)
                logprobs[rows], totals = score_labels(logits, labels[rows], 1.0)
                if wants_hidden or wants_weight:
                    slope_(logits, labels[rows], 1.0, totals, downwards[rows])
                    gradients.add_chunk(rows, logits)
            gradients.add_block(block, buffer[: block.stop - block.start])
        of_hidden = None if gradients.hidden is None else gradients.hidden.to(hidden.dtype)
        ctx.gradients = of_hidden, gradients.weight_like(weight)
        return -logprobs.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_hidden, of_weight = ctx.gradients
        ctx.gradients = None  # they are changed in place, so that a second pass would be wrong
        return (
            None if of_hidden is None else of_hidden.mul_(factor),
            None if of_weight is None else of_weight.mul_(factor),
            None,
            None,
            None,
        )
