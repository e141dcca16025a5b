"""The compiled attention against scores, softmax and sums written out, and its bits."""

from typing import Any

import pytest
import torch

from astrai_core.model import ModelConfig
from astrai_serve.engine import native_attention
from astrai_serve.engine.kv_storage import KVStorage, PagedAttention, Span
from astrai_serve.engine.native_attention import NativeAttention, attention_of

needs_native = pytest.mark.skipif(
    native_attention.why_not_native() is not None, reason="no compiled attention here"
)
LENGTH = 150
ORDER = torch.randperm(30, generator=torch.Generator().manual_seed(3)).tolist()
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"atol": 3e-6, "rtol": 1e-5},
    # queries and the softmax's weights are rounded too: 9 bits each
    torch.bfloat16: {"atol": 0.015, "rtol": 0.01},
}
in_both_types = pytest.mark.parametrize("dtype", CLOSE, ids=["float32", "bfloat16"])
page_sizes = pytest.mark.parametrize("size", [8, 16, 48])  # below, at and beside a product's rows
SHAPES = {  # query heads, key heads, width, value width
    "gqa": (8, 2, 16, 16),
    "mha": (3, 3, 12, 12),
    "mqa": (5, 1, 64, 64),
    "mla": (4, 1, 20, 16),
    "wide mla": (4, 1, 96, 64),
}


def storage_of(kind, dtype=torch.float32, size=8):
    heads, kv_heads, width, value_width = SHAPES[kind]
    sizes: dict[str, Any] = {
        "vocab_size": 9,
        "dim": 8,
        "n_layers": 1,
        "dim_ffn": 8,
        "n_heads": heads,
    }
    if "mla" in kind:
        latent: dict[str, Any] = {
            "kv_lora_rank": value_width,
            "qk_rope_head_dim": width - value_width,
        }
        config = ModelConfig(
            **sizes, attn_type="mla", use_qk_norm=False, qk_nope_head_dim=8, v_head_dim=8, **latent
        )
    else:
        config = ModelConfig(**sizes, n_kv_heads=kv_heads, head_dim=width)
    storage = KVStorage(config, 32, size, dtype)
    for cache in storage.keys + [v for v in storage.values if v is not None]:
        cache.fill_(torch.nan)  # what is no task's must never be read
    return storage


def inputs(kind) -> tuple[Any, Any, Any]:
    heads, kv_heads, width, value_width = SHAPES[kind]
    torch.manual_seed(0)
    q, k = torch.randn(LENGTH, heads, width), torch.randn(LENGTH, kv_heads, width)
    return q, k, value_width if "mla" in kind else torch.randn(LENGTH, kv_heads, value_width)


def attend(storage, q, k, v, cuts, window, table=ORDER):
    """Attend chunk by chunk, each a step of its own."""
    parts, start = [], 0
    for end in [*cuts, LENGTH]:
        context = NativeAttention(
            storage, [Span(start=start, length=end - start, page_table=table)]
        )
        values = v if isinstance(v, int) else v[start:end]
        parts.append(
            context.attend(0, q[start:end], k[start:end], values, scale=0.3, window=window)
        )
        start = end
    return torch.cat(parts)


def written_out(q, k, v, window):
    v = k[..., :v] if isinstance(v, int) else v
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * 0.3  # (H, N, N)
    far = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (far < 0) | (far >= (window or LENGTH))
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1).float()


@needs_native
@in_both_types
@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize("kind", SHAPES)
def test_it_is_attention(kind, window, dtype):
    q, k, v = inputs(kind)
    got = attend(storage_of(kind, dtype), q, k, v, [1, 2, 35, 64, 97], window)
    k, v = (x if isinstance(x, int) else x.to(dtype).float() for x in (k, v))
    torch.testing.assert_close(got, written_out(q, k, v, window), **CLOSE[dtype])


@needs_native
@in_both_types
@page_sizes
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("kind", SHAPES)
def test_chunks_and_pages_change_no_bit(kind, window, size, dtype):
    q, k, v = inputs(kind)
    whole = attend(storage_of(kind, dtype), q, k, v, [], window)
    storage = storage_of(kind, dtype, size)
    one_by_one = attend(storage, q, k, v, range(1, LENGTH), window, ORDER[::-1])
    assert torch.equal(whole, one_by_one)
    assert torch.equal(whole, attend(storage_of(kind, dtype), q, k, v, [7, 50, 51], window))


@needs_native
@in_both_types
def test_batch_mates_change_no_bit(dtype):
    q, k, v = inputs("gqa")
    alone = attend(storage_of("gqa", dtype), q, k, v, [100, 149], None)[149:]
    storage = storage_of("gqa", dtype)
    attend(storage, q, k, v, [100, 149], None)
    last = Span(start=149, length=1, page_table=ORDER)
    mate = Span(start=0, length=5, page_table=[ORDER[-1]])
    both = NativeAttention(storage, [mate, last]).attend(
        0, *(torch.cat((x[:5], x[149:])) for x in (q, k, v)), scale=0.3
    )
    assert torch.equal(both[5:], alone)
    k, v = k[:5].to(dtype).float(), v[:5].to(dtype).float()
    torch.testing.assert_close(both[:5], written_out(q[:5], k, v, None), **CLOSE[dtype])


@needs_native
def test_a_half_precision_cache_holds_rounded_numbers():
    q, k, v = inputs("gqa")
    rounded = written_out(q, k.bfloat16().float(), v.bfloat16().float(), None)
    got = attend(storage_of("gqa", torch.bfloat16), q.bfloat16(), k, v, [33], None)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), rounded, atol=0.03, rtol=0.02)


@needs_native
@in_both_types
def test_what_is_no_number_is_not_hidden(dtype):
    q, k, v = inputs("gqa")
    k[40, 0, 3] = torch.nan
    got = attend(storage_of("gqa", dtype), q, k, v, [], None).isnan().any(-1)  # (N, H)
    assert torch.equal(got[:, :4], (torch.arange(LENGTH) >= 40)[:, None].expand(-1, 4))
    assert not got[:, 4:].any()


def test_without_a_compiler_torch_attends(monkeypatch):
    monkeypatch.setattr(native_attention, "why_not_native", lambda: "no compiler")
    span = Span(start=0, length=1, page_table=[0])
    assert isinstance(attention_of(storage_of("gqa"), [span]), PagedAttention)
