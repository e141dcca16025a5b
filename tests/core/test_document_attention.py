"""Our kernel, and torch's block by block, against attention under a mask in double precision."""

import pytest
import torch

from astrai_core.model import document_attention
from astrai_core.model.document_attention import attend_documents, why_not_native


def inputs(lengths, padding, heads, kv_heads, width, dtype):
    """Two rows of the same documents; what comes with them is q, k, v and a gradient."""
    generator = torch.Generator().manual_seed(0)
    numbers = [*range(len(lengths)), -1]
    row = torch.cat(
        [torch.full((n,), i) for i, n in zip(numbers, (*lengths, padding), strict=True)]
    )
    documents = row.expand(2, -1)
    shapes = [(documents.numel(), n, width) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return documents, q, k, v, grad


def plainly(q, k, v, grad, documents, scale, window):
    """Output and gradients in float64, with every score written out."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    rows, length = documents.shape
    group = q.shape[1] // k.shape[1]
    queries, keys, values = (
        x.view(rows, length, *x.shape[1:]).transpose(1, 2)
        for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    own = (documents[:, :, None] == documents[:, None]) & (documents >= 0)[:, :, None]
    seen = seen & own | (distance == 0)
    scores = (queries @ keys.transpose(2, 3) * scale).masked_fill(~seen[:, None], -torch.inf)
    out = (scores.softmax(-1) @ values).transpose(1, 2).flatten(0, 1)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())


@pytest.fixture(params=["ours", "torch's"])
def kernel(request, monkeypatch):
    if request.param == "ours":
        assert why_not_native() is None
    else:
        monkeypatch.setattr(document_attention, "_is_native", lambda _: False)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("lengths", "padding", "heads", "kv_heads", "width", "window"),
    [
        ((70, 1, 300), 0, 4, 2, 64, None),  # a document beyond one block of keys
        ((70, 1, 300), 9, 4, 2, 16, 40),
        ((33, 32, 31), 3, 3, 1, 20, None),  # a width and lengths off the vectors' edges
        ((5,), 40, 2, 2, 8, 1),  # each token sees only itself
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_output_and_gradients(lengths, padding, heads, kv_heads, width, window, dtype, tolerance):
    documents, q, k, v, grad = inputs(lengths, padding, heads, kv_heads, width, dtype)
    scale = width**-0.5
    plain = plainly(q, k, v, grad, documents, scale, window)
    tracked = [x.requires_grad_() for x in (q, k, v)]
    out = attend_documents(q, k, v, documents, scale, window)
    ours = (out, *torch.autograd.grad(out, tracked, grad))
    for name, one, other in zip(("out", "q", "k", "v"), ours, plain, strict=True):
        assert one.dtype == dtype
        error = (one.double() - other).norm() / other.norm().clamp(min=1)
        assert error < tolerance, f"{name}: {error:.1e}"


def test_scores_of_any_size_are_finite():
    """Scores near 1e4: a sum of exponentials that was not shifted would overflow."""
    documents, q, k, v, _ = inputs((40,), 0, 2, 1, 16, torch.float32)
    out = attend_documents(q * 100, k * 100, v, documents, 1.0, None)
    plain = plainly(q * 100, k * 100, v, torch.zeros_like(q), documents, 1.0, None)[0]
    torch.testing.assert_close(out.double(), plain, rtol=1e-2, atol=1e-2)


def test_the_same_bits_whatever_the_threads():
    documents, q, k, v, grad = inputs((90, 50, 20), 4, 4, 2, 32, torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            tracked = [x.detach().requires_grad_() for x in (q, k, v)]
            out = attend_documents(tracked[0], tracked[1], tracked[2], documents, 0.2, None)
            results.append((out, *torch.autograd.grad(out, tracked, grad)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
