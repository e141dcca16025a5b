"""The most likely token: torch's own, the first among equals, and what is no number."""

import pytest
import torch

from astrai_serve.engine import greedy
from astrai_serve.engine.greedy import most_likely


@pytest.fixture(params=["native", "torch"], autouse=True)
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(greedy, "_why_not", lambda: "no compiler")
    elif (lacking := greedy._why_not()) is not None:
        pytest.skip(lacking)


@pytest.mark.parametrize("width", [1, 15, 512, 513, 32001])
def test_it_is_the_largest(width):
    logits = torch.randn(9, width)
    ids, sound = most_likely(logits)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, logits.argmax(1))
    assert sound.all()


def test_the_first_among_equals():
    logits = torch.full((3, 2000), -5.0)
    logits[0, [700, 701, 1999]] = 2.0
    logits[1, [3, 600]] = -1.0
    assert most_likely(logits)[0].tolist() == [700, 3, 0]


def test_hidden_tokens_are_sound_and_what_is_no_number_is_not():
    logits = torch.randn(6, 1000)
    logits[0, :999] = -torch.inf  # as a mask leaves it
    logits[1] = -torch.inf
    logits[2, 5] = torch.nan
    logits[3, 999] = -torch.nan
    logits[4, 0] = torch.inf
    ids, sound = most_likely(logits)
    assert sound.tolist() == [True, False, False, False, False, True]
    assert ids[0] == 999


def test_other_types_and_strides():
    logits = torch.randn(40, 70)
    assert torch.equal(most_likely(logits.t())[0], logits.t().argmax(1))
    assert torch.equal(most_likely(logits.bfloat16())[0], logits.bfloat16().argmax(1))
