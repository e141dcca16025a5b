"""Causal attention inside packed documents on a CPU, computed only where something is seen.

A mask over whole rows would have the kernel multiply all pairs of a row and then forget most of
them. Here each document is attended by itself, in blocks of queries that meet the keys up to their
own end, and key heads are never copied. The operator is opaque to the compiler, which so meets one
graph whatever the documents are.

Float32 and bfloat16 have a kernel of ours (`document_attention.cpp`), in which all is summed in
float32; where it cannot be compiled, and for other types, torch's kernel is called block by block.

N tokens, flattened rows; H query heads; KV key heads; G = H / KV; D head width; L queries of a
block; M keys that the first to last of them see.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from astrai_core.model.quantization import native

_SOURCE = Path(__file__).with_suffix(".cpp")
_BLOCK = 128
"""Queries at a time: smaller blocks waste less of the triangle, larger ones fill the kernel."""

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def can_attend_documents(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there is a kernel: heads of one width and one type, on a CPU."""
    return q.device.type == "cpu" and v.shape == k.shape and q.dtype == k.dtype == v.dtype


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attend within documents; differentiable.

    Args:
        q: (N, H, D).
        k: (N, KV, D).
        v: (N, KV, D).
        document_ids: (B, T) with B * T = N; a negative one is padding, which sees only itself.
        scale: factor on the scores.
        window: a token sees at most so many, itself included; None sees all before it.

    Returns:
        (N, H, D) in the type of q.
    """
    out, _ = torch.ops.astrai.document_attention(q, k, v, document_ids, scale, window)
    return out


@functools.cache
def why_not_native() -> str | None:
    """What this machine lacks for our kernel, in words; None where it runs."""
    return native.why_not(_SOURCE)


def _is_native(q: Tensor) -> bool:
    return q.dtype in (torch.float32, torch.bfloat16) and why_not_native() is None


class _Block(NamedTuple):
    queries: slice
    keys: slice
    mask: Tensor | None
    """(L, M), minus infinity where nothing is seen; None is plain causal."""


def _blocks(document_ids: Tensor, window: int | None, dtype: torch.dtype) -> Iterator[_Block]:
    spans = _documents(document_ids)
    longest = max((end - start for start, end in spans), default=0)
    if longest > _BLOCK or window is not None:
        # the last column is the last query's own: every block's mask is a corner of this one
        distance = torch.arange(longest, 0, -1) - torch.arange(_BLOCK, 0, -1)[:, None]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    else:
        mask = None
    for start, end in spans:
        for first in range(start, end, _BLOCK):
            last = min(first + _BLOCK, end)
            seen = start if window is None else max(start, first - window + 1)
            corner = mask if window is not None or seen < first else None
            if corner is not None:
                corner = corner[_BLOCK - (last - first) :, longest - (last - seen) :]
            yield _Block(slice(first, last), slice(seen, last), corner)


def _documents(document_ids: Tensor) -> list[tuple[int, int]]:
    """Start and end of each document among the flattened tokens; padding is none."""
    ids = document_ids.flatten()
    begins = torch.ones(len(ids) + 1, dtype=torch.bool)
    begins[1:-1] = ids[1:] != ids[:-1]
    begins[:: document_ids.shape[-1]] = True  # rows are strangers
    bounds = begins.nonzero().flatten()
    spans = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    return [span for span, known in zip(spans, ids[bounds[:-1]] >= 0, strict=True) if known]


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """Queries (L, H, D) as (KV, G, L, D)."""
    return x.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _shared(x: Tensor, group: int) -> Tensor:
    """Keys (M, KV, D) as (KV, G, M, D), without a copy."""
    return x.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    # padding sees only itself
    out = v.repeat_interleave(group, dim=1) if (document_ids < 0).any() else q.new_empty(q.shape)
    totals = q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)  # (H, N)
    if _is_native(q):
        q, k, v, document_ids = (x.contiguous() for x in (q, k, v, document_ids))
        torch.ops.astrai_documents.forward(q, k, v, document_ids, scale, window, out, totals)
        return out, totals
    for block in _blocks(document_ids, window, q.dtype):
        one, total = _attend(
            _grouped(q[block.queries], heads),
            _shared(k[block.keys], group),
            _shared(v[block.keys], group),
            0.0,
            block.mask is None,
            attn_mask=block.mask,
            scale=scale,
        )  # (KV, G, L, D), (KV, G, L)
        out[block.queries] = one.permute(2, 0, 1, 3).flatten(1, 2)
        totals[:, block.queries] = total.flatten(0, 1)
    return out, totals


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor,
    out: Tensor,
    totals: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    is_padding = document_ids.flatten() < 0
    has_padding = bool(is_padding.any())
    if _is_native(q):
        q, k, v, document_ids = (x.contiguous() for x in (q, k, v, document_ids))
        of_q = torch.zeros_like(q) if has_padding else torch.empty_like(q)
        make = torch.zeros if has_padding else torch.empty
        # what each query head adds to the heads it shares
        parts = make(2, q.shape[1], *k.shape[::2], dtype=torch.float32)  # (2, H, N, D)
        torch.ops.astrai_documents.backward(
            grad, q, k, v, document_ids, out, totals, scale, window, of_q, *parts
        )
        of_k, of_v = parts.unflatten(1, (heads, group)).sum(2).transpose(1, 2)  # (N, KV, D)
        if has_padding:
            of_v[is_padding] = grad[is_padding].unflatten(1, (heads, group)).float().sum(2)
        of_k, of_v = (x.contiguous().to(k.dtype) for x in (of_k, of_v))
        return of_q, of_k, of_v
    of_q = q.new_zeros(q.shape)
    # sums over blocks and heads, in full precision
    of_k, of_v = (x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))
    for block in _blocks(document_ids, window, q.dtype):
        one_q, one_k, one_v = _attend_backward(
            _grouped(grad[block.queries], heads),
            _grouped(q[block.queries], heads),
            _shared(k[block.keys], group),
            _shared(v[block.keys], group),
            _grouped(out[block.queries], heads),
            totals[:, block.queries].unflatten(0, (heads, group)).contiguous(),
            0.0,
            block.mask is None,
            attn_mask=block.mask,
            scale=scale,
        )  # (KV, G, L or M, D)
        of_q[block.queries] = one_q.permute(2, 0, 1, 3).flatten(1, 2)
        of_k[block.keys] += one_k.sum(1, dtype=torch.float32).permute(1, 0, 2)
        of_v[block.keys] += one_v.sum(1, dtype=torch.float32).permute(1, 0, 2)
    if has_padding:
        of_v[is_padding] = grad[is_padding].unflatten(1, (heads, group)).float().sum(2)
    return of_q, of_k.to(k.dtype), of_v.to(v.dtype)


_LIBRARY = torch.library.Library("astrai", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor document_ids"
_LIBRARY.define(
    f"document_attention({_INPUTS}, float scale, SymInt? window) -> (Tensor, Tensor)",
)
_LIBRARY.define(
    f"document_attention_gradients(Tensor grad, {_INPUTS}, Tensor out, Tensor totals, "
    "float scale, SymInt? window) -> (Tensor, Tensor, Tensor)",
)
_LIBRARY.impl("document_attention", _forward, "CPU")
_LIBRARY.impl("document_attention_gradients", _gradients, "CPU")


@torch.library.register_fake("astrai::document_attention", lib=_LIBRARY)
def _shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.register_fake("astrai::document_attention_gradients", lib=_LIBRARY)
def _shapes_of_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    del grad
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    of_inputs = torch.ops.astrai.document_attention_gradients(
        grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.window
    )
    return *of_inputs, None, None, None


torch.library.register_autograd(
    "astrai::document_attention", _backward, setup_context=_keep, lib=_LIBRARY
)
