"""Scores of labels and their slope against log_softmax and autograd in double precision."""

import pytest
import torch

from astrai_core.model import token_scores
from astrai_core.model.token_scores import score_labels, slope_, why_not_native


@pytest.fixture(params=["ours", "torch's"])
def kernel(request, monkeypatch):
    if request.param == "ours":
        assert why_not_native() is None
    else:
        monkeypatch.setattr(token_scores, "_is_native", lambda _: False)


def inputs(dtype, vocab=1003):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, vocab, generator=generator) * 8).to(dtype)
    labels = torch.randint(vocab, (7,), generator=generator)
    labels[0] = logits[0].argmax()
    return logits, labels, torch.randn(7, generator=generator)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_scores_and_slope(dtype, tolerance, temperature):
    logits, labels, gradient = inputs(dtype)
    exact = logits.double().requires_grad_()
    table = (exact / temperature).log_softmax(1)
    plain = table.gather(1, labels[:, None]).squeeze(1)
    wanted = torch.autograd.grad((plain * gradient).sum(), exact)[0]

    logprobs, totals = score_labels(logits, labels, temperature)
    torch.testing.assert_close(logprobs.double(), plain, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(totals.double(), (exact / temperature).logsumexp(1))
    slope = slope_(logits, labels, temperature, totals, gradient)
    assert slope.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(slope.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("kernel")
def test_huge_logits_stay_finite():
    logits, labels, _ = inputs(torch.float32)
    logprobs, totals = score_labels(logits * 1000, labels, 1.0)
    assert logprobs.isfinite().all()
    assert totals.isfinite().all()
    assert logprobs[0] == 0  # the label is the largest by far


def test_a_label_out_of_range_is_refused():
    logits, labels, _ = inputs(torch.float32)
    labels[3] = 1003
    with pytest.raises(RuntimeError, match="out of range"):
        score_labels(logits, labels, 1.0)
