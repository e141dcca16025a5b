"""Choosing tokens: pure functions over logits, many tasks at once.

R rows (tasks that sample), V tokens, K candidates. Each row is treated as if it were alone, and a
draw depends on one number that is computed from (seed, sample, position). So neither batch-mates
nor preemption change what a task says, but for the rounding of its logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

# Candidates looked at first where top_p alone limits them; a row that needs more is sorted whole.
NUM_CANDIDATES = 256


def counter_uniform(seed: int, sample_index: int, position: int) -> float:
    """A number from [0, 1), uniform over the arguments and always the same for the same ones."""
    key = f"{seed}/{sample_index}/{position}".encode()
    return (int.from_bytes(blake2b(key, digest_size=8).digest()) >> 11) * 2.0**-53


@dataclass(frozen=True, kw_only=True)
class Filters:
    """How each row draws: columns of R numbers."""

    temperature: Tensor
    """(R,) float, above 0."""
    top_k: Tensor
    """(R,) int64; V where all are kept."""
    top_p: Tensor
    """(R,) float."""
    min_p: Tensor
    """(R,) float."""

    def rows(self, index: Tensor) -> "Filters":
        """The filters of some rows."""
        return Filters(
            temperature=self.temperature[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            min_p=self.min_p[index],
        )


@dataclass(frozen=True, kw_only=True)
class Adjustments:
    """Changes to single logits, as coordinates; E entries."""

    row: Sequence[int]
    token: Sequence[int]
    repetition: Sequence[float]
    """Divides a positive logit and multiplies a negative one; 1 changes nothing."""
    bias: Sequence[float]
    """Added afterwards; -inf forbids the token. Coordinates may repeat."""

    def apply(self, logits: Tensor) -> Tensor:
        """Return adjusted logits (R, V)."""
        device = logits.device
        rows = torch.tensor(self.row, device=device)
        tokens = torch.tensor(self.token, device=device)
        factor = torch.tensor(self.repetition, dtype=logits.dtype, device=device)
        logits = logits.clone()
        # a coordinate occurs at most once with a factor other than 1
        repeated = factor != 1
        at = (rows[repeated], tokens[repeated])
        old = logits[at]
        logits[at] = torch.where(old > 0, old / factor[repeated], old * factor[repeated])
        bias = torch.tensor(self.bias, dtype=logits.dtype, device=device)
        return logits.index_put_((rows, tokens), bias, accumulate=True)


def log_probabilities(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probability (R,) of one token per row under the softmax of logits (R, V)."""
    return logits.log_softmax(1).gather(1, token_ids[:, None])[:, 0]


def top_log_probabilities(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most likely tokens of each row: log-probabilities and ids, (R, count) each."""
    values, ids = logits.topk(min(count, logits.shape[1]), dim=1)
    return values - logits.logsumexp(1, keepdim=True), ids


def draw(logits: Tensor, filters: Filters, uniform: Tensor) -> Tensor:
    """Draw a token per row.

    The order is: temperature, top-k, top-p over what is left, min-p over what is left.

    Args:
        logits: (R, V), adjusted.
        filters: of the R rows.
        uniform: (R,) float64 from [0, 1), which decides.

    Returns:
        (R,) token ids.
    """
    scaled = logits.float() / filters.temperature[:, None]
    vocab_size = logits.shape[1]
    narrow = (filters.top_k < vocab_size) | (filters.top_p < 1)
    if not bool(narrow.any()):
        return _draw_from_all(scaled, filters.min_p, uniform)
    chosen = torch.empty_like(filters.top_k)
    wide = torch.nonzero(~narrow)[:, 0]
    if len(wide):
        chosen[wide] = _draw_from_all(scaled[wide], filters.min_p[wide], uniform[wide])
    rows, num_candidates = torch.nonzero(narrow)[:, 0], min(NUM_CANDIDATES, vocab_size)
    while len(rows):
        ids, is_certain = _draw_from_top(
            scaled[rows], filters.rows(rows), uniform[rows], num_candidates
        )
        chosen[rows[is_certain]] = ids[is_certain]
        rows, num_candidates = rows[~is_certain], vocab_size
    return chosen


def _draw_from_top(
    scaled: Tensor, filters: Filters, uniform: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Draw among the most likely tokens; also tell for which rows these were enough, (R,) bool."""
    values, ids = scaled.topk(num_candidates, dim=1)  # (R, K), descending
    rank = torch.arange(num_candidates, device=scaled.device)
    within_k = rank < filters.top_k[:, None]
    # what top-p is a share of: the top k tokens where there is such a limit, else all tokens
    unlimited = filters.top_k >= scaled.shape[1]
    total = values.masked_fill(~within_k, -torch.inf).logsumexp(1)
    total = torch.where(unlimited, scaled.logsumexp(1), total)
    share = (values - total[:, None]).double().exp().masked_fill(~within_k, 0)
    before = share.cumsum(1) - share
    is_kept = within_k & (before < filters.top_p[:, None])
    is_kept &= values >= values[:, :1] + filters.min_p.log()[:, None]
    is_kept[:, 0] = True
    is_enough = before[:, -1] + share[:, -1] >= filters.top_p
    is_certain = torch.where(unlimited, is_enough, filters.top_k <= num_candidates)
    if num_candidates == scaled.shape[1]:
        is_certain = torch.ones_like(is_certain)
    place = _invert(share.masked_fill(~is_kept, 0), uniform)
    return ids.gather(1, place[:, None])[:, 0], is_certain


def _draw_from_all(scaled: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    # one new tensor and no more: on some systems its pages cost more than the arithmetic
    relative = (scaled - scaled.amax(1, keepdim=True)).exp_()
    if bool((min_p > 0).any()):
        relative = relative.masked_fill(relative < min_p[:, None], 0)
    return _invert(relative, uniform)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index (R,) at which the running sum of weights (R, N) passes its share `uniform`.

    In two steps, blocks and then within the block: a running sum over a whole vocabulary is the
    slowest part of drawing, and the least exact one.
    """
    num_rows, num_weights = weights.shape
    size = max(1, math.isqrt(num_weights))
    padded = torch.nn.functional.pad(weights, (0, -num_weights % size)).view(num_rows, -1, size)
    block_sums = padded.sum(2, dtype=torch.float64)  # (R, blocks)
    sums = block_sums.cumsum(1)
    target = uniform[:, None] * sums[:, -1:]  # (R, 1)
    block = _first_above(sums, target)  # (R, 1)
    inside = padded.gather(1, block[..., None].expand(-1, 1, size))[:, 0].double()
    # rounding may leave less than nothing; then the first weight above 0 is meant
    rest = (target - sums.gather(1, block) + block_sums.gather(1, block)).clamp(min=0)
    return (block * size + _first_above(inside.cumsum(1), rest))[:, 0]


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """First index of each row whose running sum exceeds the target, (R, 1).

    Where rounding leaves none, the last index at which the sum still grew.
    """
    last = (sums < sums[:, -1:]).sum(1, keepdim=True)
    return torch.minimum(torch.searchsorted(sums, target, right=True), last)
