"""Keys and values in pages, and the attention over them.

A page is a fixed run of `page_size` slots; slot = page * page_size + offset. Each layer's cache is
head-major, so that a task whose pages follow one another is a plain view and nothing is gathered:

    keys    (KV, num_slots, Dk)        page 0 | page 1 | page 2 | ...
    values  (KV, num_slots, Dv)        MLA keeps none: its values are the first entries of the key

A task's table may still be broken into several runs (a shared prefix, a full pool): each run is
attended to on its own and the parts are joined by their log-sum-exp. Many decoding tasks with short
contexts are the exception: there a call for each costs more than copying, so their slots are
gathered and attended to together. The whole step is one operator on tensors, so that a compiled
model sees no Python object.

N tokens of a step, flattened; H query heads; KV key heads; G = H / KV; B tasks gathered together,
the longest of them of L tokens.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from astrai_core.model import AttentionContext, ModelConfig

# A decoding task's context is gathered up to so many bytes in a layer: measured, copying it then
# still costs less than a call of its own.
GATHERED_BYTES = 96 << 10


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
        self.bytes_per_slot = heads * (key_dim + value_dim) * dtype.itemsize
        """Of one layer."""
        slots = num_pages * page_size

        def allocate(width: int) -> list[Tensor]:
            return [_zeros((heads, slots, width), dtype, device) for _ in range(config.n_layers)]

        self.keys = allocate(key_dim)
        self.values = allocate(value_dim) if value_dim else [None] * config.n_layers

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that one token takes in all layers together."""
        heads, key_dim, value_dim = config.cache_shape
        return config.n_layers * heads * (key_dim + value_dim) * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros that, on a CPU, take memory only where they have been written to."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes its zeros; the system has pages that are zero, and are there when they are needed
    num_bytes = math.prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
    content = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # a few tokens in each layer and head would else take two megabytes each
    content.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(shape)


class PagedAttention(AttentionContext):
    """The attention context of one engine step (the seed's KvcacheView)."""

    def __init__(
        self,
        storage: KVStorage,
        slots: Tensor,
        spans: Tensor,
        runs: Tensor,
        gathered: tuple[Tensor, Tensor, Tensor],
    ):
        self.storage = storage
        self.slots = slots
        self.spans = spans
        self.runs = runs
        self.gathered = gathered

    @classmethod
    def build(cls, storage: KVStorage, spans: Sequence[Span]) -> "PagedAttention":
        """Describe a step whose tokens are those of `spans`, one after the other."""
        size = storage.page_size
        longest = GATHERED_BYTES // storage.bytes_per_slot
        short = [span for span in spans if span.length == 1 and span.start < longest]
        is_gathered = {id(span) for span in short} if len(short) > 1 else set[int]()
        slots: list[int] = []
        alone: list[tuple[int, int, int]] = []
        runs: list[tuple[int, int, int]] = []
        rows: list[int] = []
        tables: list[Tensor] = []
        for span in spans:
            begin, end, table = len(slots), span.start + span.length, span.page_table
            slots += [table[p // size] * size + p % size for p in range(span.start, end)]
            if id(span) in is_gathered:
                rows.append(begin)
                tables.append(torch.tensor(table[: span.start // size + 1]))
                continue
            # a single token reads itself back from the cache; a chunk attends to itself directly
            cached = end if span.length == 1 else span.start
            runs += [(len(alone), first, n) for first, n in _runs(table, size, cached)]
            alone.append((begin, span.start, span.length))
        device = storage.keys[0].device
        lengths = [span.start + 1 for span in short] if rows else []
        return cls(
            storage,
            torch.tensor(slots, dtype=torch.int64, device=device),
            torch.tensor(alone, dtype=torch.int64).view(-1, 3),
            torch.tensor(runs, dtype=torch.int64).view(-1, 3),
            (
                torch.tensor(rows, dtype=torch.int64, device=device),
                torch.tensor(lengths, dtype=torch.int64, device=device),
                _padded_slots(tables, size, max(lengths, default=0)).to(device),
            ),
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
            *self.gathered,
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


def _padded_slots(tables: Sequence[Tensor], size: int, length: int) -> Tensor:
    """Slots (B, length) of tasks' positions; slot 0 stands where a task has no such position."""
    if not tables:
        return torch.empty(0, 0, dtype=torch.int64)
    pages = torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True)
    slots = pages[:, :, None] * size + torch.arange(size)  # (B, pages, size)
    return slots.flatten(1)[:, :length].contiguous()


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slots: Tensor,
    spans: Tensor,
    runs: Tensor,
    rows: Tensor,
    lengths: Tensor,
    gathered: Tensor,
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
        spans: (S, 3) on the CPU: of each task that is attended to on its own, the place of its
            tokens among the N, the position of the first and their number.
        runs: (R, 3) on the CPU, span, first slot and length, in the order of positions. They cover
            what comes before the span, and, where the span is a single token, that token too.
        rows: (B,), the places among the N of the single tokens that are attended to together.
        lengths: (B,), what each of them sees, itself included.
        gathered: (B, L), the slots of what they see, padded by any.
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
    if len(rows):
        out[rows] = _attend_gathered(
            grouped[rows], key_cache, all_values, lengths, gathered, scale, window
        )
    for index, (begin, start, length) in enumerate(spans.tolist()):
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
            parts.append(_attend_one(queries, keys, values.to(keys.dtype), scale, mask))
        joined = _join(parts).view(num_kv_heads, -1, length, value_dim)
        out[begin : begin + length] = joined.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _attend_gathered(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    gathered: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Attend from single queries (B, KV, G, D), each to its own row of gathered slots (B, L).

    Returns:
        (B, H, Dv).
    """
    # slots of each head are neighbours, so a head's rows are copied one after the other
    keys = key_cache[:, gathered].transpose(0, 1)  # (B, KV, L, Dk)
    if value_cache.data_ptr() == key_cache.data_ptr():
        values = keys[..., : value_cache.shape[-1]]
    else:
        values = value_cache[:, gathered].transpose(0, 1)  # (B, KV, L, Dv)
    position = torch.arange(gathered.shape[1], device=q.device)
    mask = position < lengths[:, None]  # (B, L)
    if window:
        mask &= position >= lengths[:, None] - window
    return _attend(q, keys, values, scale, mask[:, None, None])[0].flatten(1, 2)


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
        parts.append(_attend_one(queries, keys, values, scale, mask))
    return parts


def _causal_mask(length: int, window: int, device: torch.device) -> Tensor:
    index = torch.arange(length, device=device)
    distance = index[:, None] - index
    mask = distance >= 0
    return mask & (distance < window) if window else mask


def _attend_one(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend within one task: q (KV, M, Dk), k (KV, L, Dk), v (KV, L, Dv), mask (M, L)."""
    out, log_sum = _attend(q[None], k[None], v[None], scale, mask)
    return out[0], log_sum[0]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend from q (B, KV, M, Dk) to k (B, KV, L, Dk) and v (B, KV, L, Dv).

    A query whose mask hides everything has output 0 and log-sum-exp -inf.

    Returns:
        Output (B, KV, M, Dv) and log-sum-exp (B, KV, M).
    """
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        bias.masked_fill_(~mask, -torch.inf)
    if q.device.type == "cpu" and k.shape[-1] == v.shape[-1]:
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
        if mask is None:
            return out, log_sum
        empty = ~mask.any(-1)
        return out.masked_fill(empty[..., None], 0), log_sum.masked_fill(empty, -torch.inf)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if bias is not None:
        scores = scores + bias
    log_sum = scores.logsumexp(-1)  # (B, KV, M)
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
    "Tensor slots, Tensor spans, Tensor runs, Tensor rows, Tensor lengths, Tensor gathered, "
    "float scale, int value_dim, int window) -> Tensor"
)
# not torch.library.custom_op: its Python wrapper costs as much as a small layer's attention
_LIBRARY.impl("paged_attention", paged_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("astrai::paged_attention", lib=_LIBRARY)
def _shape_of_output(q: Tensor, *others: Tensor | float | None) -> Tensor:
    *_, value_dim, _window = others
    assert isinstance(value_dim, int)
    return q.new_empty(q.shape[0], q.shape[1], value_dim)
