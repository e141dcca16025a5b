"""Attention over pages by our own compiled operator, where this machine can have it.

It reads keys and values where they lie, and a token's result depends on its own context alone, bit
by bit: the head of `attention.cpp` says how. `PagedAttention` is what there is without it.

N tokens of a step, flattened; S spans; P pages of all of them.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from astrai_core.model import AttentionContext
from astrai_core.model.quantization import native
from astrai_serve.engine.kv_storage import KVStorage, PagedAttention, Span

_SOURCE = Path(__file__).with_name("attention.cpp")


class NativeAttention(AttentionContext):
    """The attention context of one engine step on a CPU with AVX2."""

    def __init__(self, storage: KVStorage, spans: Sequence[Span]):
        size = storage.page_size
        slots: list[int] = []
        rows: list[tuple[int, int, int, int]] = []
        pages: list[int] = []
        for span in spans:
            end = span.start + span.length
            rows.append((len(slots), span.start, span.length, len(pages)))
            pages += span.page_table[: -(-end // size)]
            slots += [span.page_table[p // size] * size + p % size for p in range(span.start, end)]
        self.storage = storage
        self._slots = torch.tensor(slots, dtype=torch.int64)  # (N,)
        # place of the first token, its position, how many, where the table begins in pages
        self._spans = torch.tensor(rows, dtype=torch.int64).view(-1, 4)  # (S, 4)
        self._pages = torch.tensor(pages, dtype=torch.int64)  # (P,)

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
        out = torch.ops.astrai_attention.paged_attention(
            q.float().contiguous(),
            k.float().contiguous(),
            None if values is None else values.float().contiguous(),
            self.storage.keys[layer],
            self.storage.values[layer],
            self._slots,
            self._spans,
            self._pages,
            self.storage.page_size,
            scale,
            value_dim,
            window or 0,
        )
        return out.to(q.dtype)


def attention_of(storage: KVStorage, spans: Sequence[Span]) -> AttentionContext:
    """Describe a step whose tokens are those of `spans`, for the best attention there is."""
    if storage.keys[0].device.type == "cpu" and why_not_native() is None:
        return NativeAttention(storage, spans)
    return PagedAttention.build(storage, spans)


@functools.cache
def why_not_native() -> str | None:
    """What this machine lacks for the compiled attention, in words; None where it runs."""
    return native.why_not(_SOURCE)
