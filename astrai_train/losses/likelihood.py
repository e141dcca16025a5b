"""The likelihood of tokens.

N positions; dim is the model's width, vocab the rows of its output matrix.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

IGNORED = -100
"""Label of a position that is not trained."""

# Rows of logits that exist at a time. Small chunks stay in the cache, so that this is not only
# smaller than all logits at once (12 MB instead of 100 MB for 4,096 tokens and a vocabulary of
# 6,144) but takes two thirds of its time on a CPU.
_CHUNKS = LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None)


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
    nats = F.linear_cross_entropy(
        hidden.to(output_weight.dtype), output_weight, wanted, reduction="sum", options=_CHUNKS
    )
    total = nats
    if smoothing:
        rows = F.embedding(wanted, output_weight) - output_weight.mean(0)  # (N, dim)
        total = nats + smoothing * (hidden.float() * rows.float()).sum()
    return total, nats.detach(), (flat != IGNORED).sum()
