"""Keys and values in pages, and the attention over them.

A page is a fixed run of `page_size` slots; slot = page * page_size + offset. Each layer's cache is
head-major, so that a task whose pages follow one another is a plain view and nothing is gathered:

    keys    (KV, num_slots, Dk)        page 0 | page 1 | page 2 | ...
    values  (KV, num_slots, Dv)        MLA keeps none: its values are the first entries of the key

A task's table may still be broken into several runs (a shared prefix, a full pool): each run is
attended to on its own and the parts are joined by their log-sum-exp. The whole step is one operator
on tensors, so that a compiled model sees no Python object.

N tokens of a step, flattened; H query heads; KV key heads; G = H / KV.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from astrai_core.model import AttentionContext, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Span:
    """The tokens of one task that a step computes."""

    start: int
    """Position of the first of them; the positions before it are in the cache."""
    length: int
    """How many there are."""
    page_table: Sequence[int]
    """Pages of the task, at least for its first start + length positions."""


class KVStorage:
    """The tensors behind all pages."""

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.page_size = page_size
        self.num_pages = num_pages
        heads, key_dim, value_dim = config.cache_shape
        self.value_dim = value_dim
        slots = num_pages * page_size

        def allocate(width: int) -> list[Tensor]:
            return [
                torch.zeros(heads, slots, width, dtype=dtype, device=device)
                for _ in range(config.n_layers)
            ]

        self.keys = allocate(key_dim)
        self.values = allocate(value_dim) if value_dim else [None] * config.n_layers

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that one token takes in all layers together."""
        heads, key_dim, value_dim = config.cache_shape
        return config.n_layers * heads * (key_dim + value_dim) * dtype.itemsize


class PagedAttention(AttentionContext):
    """The attention context of one engine step (the seed's KvcacheView)."""

    def __init__(self, storage: KVStorage, slots: Tensor, spans: Tensor, runs: Tensor):
        self.storage = storage
        self.slots = slots
        self.spans = spans
        self.runs = runs

    @classmethod
    def build(cls, storage: KVStorage, spans: Sequence[Span]) -> "PagedAttention":
        """Describe a step whose tokens are those of `spans`, one after the other."""
        size = storage.page_size
        slots: list[int] = []
        runs: list[tuple[int, int, int]] = []
        for index, span in enumerate(spans):
            end = span.start + span.length
            table = span.page_table
            slots += [table[p // size] * size + p % size for p in range(span.start, end)]
            # a single token reads itself back from the cache; a chunk attends to itself directly
            cached = end if span.length == 1 else span.start
            runs += [(index, first, n) for first, n in _runs(span.page_table, size, cached)]
        device = storage.keys[0].device
        return cls(
            storage,
            torch.tensor(slots, dtype=torch.int64, device=device),
            torch.tensor([(s.start, s.length) for s in spans], dtype=torch.int64).view(-1, 2),
            torch.tensor(runs, dtype=torch.int64).view(-1, 3),
        )

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | int,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Store the step's keys and values, then attend over each task's pages."""
        values, value_dim = (None, v) if isinstance(v, int) else (v, v.shape[-1])
        return torch.ops.astrai.paged_attention(
            q,
            k,
            values,
            self.storage.keys[layer],
            self.storage.values[layer],
            self.slots,
            self.spans,
            self.runs,
            scale,
            value_dim,
            window or 0,
        )


def _runs(page_table: Sequence[int], size: int, num_tokens: int) -> list[tuple[int, int]]:
    """Cut the first `num_tokens` slots of a table into (first slot, length) of unbroken runs."""
    runs: list[tuple[int, int]] = []
    for index in range(-(-num_tokens // size)):
        page, length = page_table[index], min(size, num_tokens - index * size)
        if runs and runs[-1][0] + runs[-1][1] == page * size:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((page * size, length))
    return runs


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slots: Tensor,
    spans: Tensor,
    runs: Tensor,
    scale: float,
    value_dim: int,
    window: int,
) -> Tensor:
    """Store k and v at `slots`, then attend from each span over its runs and over itself.

    Args:
        q: (N, H, Dk).
        k: (N, KV, Dk).
        v: (N, KV, Dv); None when the values are the first `value_dim` entries of the keys.
        key_cache: (KV, num_slots, Dk); changed.
        value_cache: (KV, num_slots, Dv) or None; changed.
        slots: (N,), where each token is stored.
        spans: (S, 2) on the CPU, start and length of each task's tokens.
        runs: (R, 3) on the CPU, span, first slot and length, in the order of positions. They cover
            what comes before the span, and, where the span is a single token, that token too.
        scale: factor on the scores.
        value_dim: Dv.
        window: tokens that a token sees, itself included; 0 is all.

    Returns:
        (N, H, Dv).
    """
    num_kv_heads = k.shape[1]
    key_cache.index_copy_(1, slots, k.transpose(0, 1).to(key_cache.dtype))
    if v is not None and value_cache is not None:
        value_cache.index_copy_(1, slots, v.transpose(0, 1).to(value_cache.dtype))
    all_values = key_cache[..., :value_dim] if value_cache is None else value_cache
    out = q.new_empty(q.shape[0], q.shape[1], value_dim)
    grouped = q.to(key_cache.dtype).view(q.shape[0], num_kv_heads, -1, q.shape[2])  # (N, KV, G, D)
    runs_of: dict[int, list[tuple[int, int]]] = {}
    for span, first, length in runs.tolist():
        runs_of.setdefault(span, []).append((first, length))
    begin = 0
    for index, (start, length) in enumerate(spans.tolist()):
        # queries of a head group stand together: (KV, G * length, D)
        queries = grouped[begin : begin + length].permute(1, 2, 0, 3).flatten(1, 2)
        parts = _attend_runs(
            queries, key_cache, all_values, runs_of.get(index, []), start, length, scale, window
        )
        if length > 1:
            keys = k[begin : begin + length].transpose(0, 1).to(key_cache.dtype)  # (KV, n, D)
            values = (
                keys[..., :value_dim] if v is None else v[begin : begin + length].transpose(0, 1)
            )
            mask = _causal_mask(length, window, q.device).repeat(queries.shape[1] // length, 1)
            parts.append(_attend(queries, keys, values.to(keys.dtype), scale, mask))
        joined = _join(parts).view(num_kv_heads, -1, length, value_dim)
        out[begin : begin + length] = joined.permute(2, 0, 1, 3).flatten(1, 2)
        begin += length
    return out


def _attend_runs(
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    runs: list[tuple[int, int]],
    start: int,
    length: int,
    scale: float,
    window: int,
) -> list[tuple[Tensor, Tensor]]:
    """Attend from queries (KV, G * length, D) to cached runs before them, within the window."""
    parts: list[tuple[Tensor, Tensor]] = []
    position = 0
    for first, run_length in runs:
        begin, end = position, position + run_length
        position = end
        mask = None
        if window:
            # the first query sees furthest back; what even it cannot see is never read
            begin = max(begin, start - window + 1)
            if begin >= end:
                continue
            if length > 1:
                distance = torch.arange(start, start + length)[:, None] - torch.arange(begin, end)
                mask = (distance < window).to(queries.device).repeat(queries.shape[1] // length, 1)
        offset = first + begin - (end - run_length)
        keys = key_cache[:, offset : offset + end - begin]
        values = value_cache[:, offset : offset + end - begin]
        parts.append(_attend(queries, keys, values, scale, mask))
    return parts


def _causal_mask(length: int, window: int, device: torch.device) -> Tensor:
    index = torch.arange(length, device=device)
    distance = index[:, None] - index
    mask = distance >= 0
    return mask & (distance < window) if window else mask


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend from q (KV, M, Dk) to k (KV, L, Dk) and v (KV, L, Dv): output and log-sum-exp (KV, M).

    A query whose mask hides everything has output 0 and log-sum-exp -inf.
    """
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        bias.masked_fill_(~mask, -torch.inf)
    if q.device.type == "cpu" and k.shape[-1] == v.shape[-1]:
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, False, attn_mask=bias, scale=scale
        )
        out, log_sum = out[0], log_sum[0]
        if mask is None:
            return out, log_sum
        empty = ~mask.any(-1)
        return out.masked_fill(empty[:, None], 0), log_sum.masked_fill(empty, -torch.inf)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if bias is not None:
        scores = scores + bias
    log_sum = scores.logsumexp(-1)  # (KV, M)
    weights = (scores - log_sum.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp()
    return (weights.to(v.dtype) @ v), log_sum


def _join(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Join the outputs of disjoint sets of keys into that of their union."""
    if len(parts) == 1:
        return parts[0][0]
    total = torch.stack([log_sum for _, log_sum in parts]).logsumexp(0)
    joined = sum(out.float() * (log_sum - total).exp()[..., None] for out, log_sum in parts)
    assert isinstance(joined, Tensor)
    return joined


_LIBRARY = torch.library.Library("astrai", "FRAGMENT")
_LIBRARY.define(
    "paged_attention(Tensor q, Tensor k, Tensor? v, Tensor(a!) key_cache, Tensor(b!)? value_cache, "
    "Tensor slots, Tensor spans, Tensor runs, float scale, int value_dim, int window) -> Tensor"
)
# not torch.library.custom_op: its Python wrapper costs as much as a small layer's attention
_LIBRARY.impl("paged_attention", paged_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("astrai::paged_attention", lib=_LIBRARY)
def _shape_of_output(q: Tensor, *others: Tensor | float | None) -> Tensor:
    *_, value_dim, _window = others
    assert isinstance(value_dim, int)
    return q.new_empty(q.shape[0], q.shape[1], value_dim)
