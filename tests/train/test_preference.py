import math

import pytest
import torch
from torch import Tensor

from astrai_train.losses.preference import (
    check_preference,
    preference_losses,
    sequence_logprobs,
)

SCORES = torch.tensor([[1.5, -0.5], [-2.0, 3.0], [0.0, 0.0]])
LENGTHS = torch.tensor([[3, 1], [2, 4], [5, 5]])
BETA = 0.3


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(formula) -> Tensor:
    return torch.tensor([formula(c, r) for c, r in SCORES.tolist()])


def normed(formula) -> Tensor:
    return torch.tensor([formula(c, r) for c, r in (SCORES / LENGTHS).tolist()])


def smoothed(c, r, e=0.2):
    return -(1 - e) * math.log(s(BETA * (c - r))) - e * math.log(s(BETA * (r - c)))


def robust(c, r, e=0.2):
    kept, swapped = math.log(s(BETA * (c - r))), math.log(s(BETA * (r - c)))
    return (-(1 - e) * kept + e * swapped) / (1 - 2 * e)


CASES = {
    "sigmoid": ({}, by_hand(lambda c, r: -math.log(s(BETA * (c - r))))),
    "cDPO": ({"label_smoothing": 0.2}, by_hand(smoothed)),
    "robust": ({"loss": "robust", "label_smoothing": 0.2}, by_hand(robust)),
    "ipo": ({"loss": "ipo"}, normed(lambda c, r: (c - r - 1 / (2 * BETA)) ** 2)),
    "norm": ({"loss": "sigmoid_norm"}, normed(lambda c, r: -math.log(s(BETA * (c - r))))),
    "mean": ({"reduction": "mean"}, normed(lambda c, r: -math.log(s(BETA * (c - r))))),
    "hinge": ({"loss": "hinge"}, by_hand(lambda c, r: max(0, 1 - BETA * (c - r)))),
    "apo_zero": ({"loss": "apo_zero"}, by_hand(lambda c, r: 1 - s(BETA * c) + s(BETA * r))),
    "apo_down": ({"loss": "apo_down"}, by_hand(lambda c, r: s(BETA * c) + 1 - s(BETA * (c - r)))),
}


@pytest.mark.parametrize("case", CASES)
def test_each_loss_is_its_formula(case):
    options, wanted = CASES[case]
    torch.testing.assert_close(preference_losses(SCORES, LENGTHS, beta=BETA, **options), wanted)


def test_a_far_lost_pair_costs_its_distance_and_not_infinity():
    losses = preference_losses(torch.tensor([[-1e4, 1e4]]), torch.ones(1, 2), beta=1.0)
    assert losses.tolist() == [2e4]


def test_robust_without_noise_is_sigmoid():
    plain = preference_losses(SCORES, LENGTHS)
    assert torch.equal(preference_losses(SCORES, LENGTHS, loss="robust"), plain)


def test_packed_tokens_are_added_up_by_sequence():
    logprobs = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])
    document_ids = torch.tensor([[0, 0, 2], [2, 2, -1]])
    kept = torch.tensor([[True, False, True], [True, True, False]])
    sums, counts = sequence_logprobs(logprobs, kept, document_ids, 4)
    assert sums.tolist() == [-1.0, 0.0, -28.0, 0.0]
    assert counts.tolist() == [1, 0, 3, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("sigmoid", 0.0, 0.0), "beta must be above 0, not 0.0"),
        (("sigmoid", 0.1, 0.5), "label_smoothing .* below 0.5, not 0.5"),
        (("ipo", 0.1, 0.1), "means nothing to loss ipo; set it to 0"),
        (("simpo", 0.1, 0.0), "loss must be one of sigmoid, .*, not simpo"),
    ],
)
def test_what_a_loss_does_not_define_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_preference(*options)
