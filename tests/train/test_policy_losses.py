"""Policy losses against arithmetic by hand and against autograd."""

import math

import pytest
import torch

from astrai_train.losses.policy import (
    clipped_policy_loss,
    group_advantages,
    kl_penalty,
    sum_over_tokens,
    window_count,
    zero_variance_groups,
)

PAIRS = torch.tensor([0, 0, 1, 1])


def test_an_advantage_is_the_distance_from_the_group_in_its_deviations():
    advantages = group_advantages(torch.tensor([1.0, 3.0, 0.0, 0.5]), PAIRS)
    # unbiased deviations of (1, 3) and (0, 0.5)
    first, second = math.sqrt(2), math.sqrt(0.125)
    wanted = [-1 / (first + 1e-4), 1 / (first + 1e-4)]
    wanted += [-0.25 / (second + 1e-4), 0.25 / (second + 1e-4)]
    assert advantages.tolist() == pytest.approx(wanted)


def test_it_is_scaled_by_the_batch_or_not_at_all():
    rewards = torch.tensor([1.0, 3.0, 0.0, 4.0])
    plain = group_advantages(rewards, PAIRS, "none")
    assert plain.tolist() == [-1, 1, -2, 2]
    batch = group_advantages(rewards, PAIRS, "batch")
    deviation = math.sqrt((1 + 1 + 4 + 4) / 3)
    assert batch.tolist() == pytest.approx([x / (deviation + 1e-4) for x in (-1, 1, -2, 2)])
    given = group_advantages(rewards, PAIRS, "batch", torch.tensor(2.0))
    assert given.tolist() == pytest.approx([x / 2.0001 for x in (-1, 1, -2, 2)])


def test_equal_rewards_teach_exactly_nothing():
    """0.1 three times has a rounded mean, and a tiny deviation would blow the rest up."""
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.0, 1.0], dtype=torch.float64)
    for scale in ("group", "batch", "none"):
        assert group_advantages(rewards, groups, scale)[:3].tolist() == [0, 0, 0]
    assert zero_variance_groups(rewards, groups) == (1, 2)


def test_a_completion_that_nothing_judged_stays_out_of_its_group():
    rewards = torch.tensor([1.0, 2.0, math.nan, math.nan, 5.0, math.nan])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    advantages = group_advantages(rewards, groups, "none")
    assert advantages.tolist() == [-0.5, 0.5, 0, 0, 0, 0]


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="prompt 1 has one completion only"):
        group_advantages(torch.ones(3), torch.tensor([0, 0, 1]))


def test_the_clipped_surrogate_is_the_pessimistic_one():
    """Ratios 0.5, 1 and 2, each with a good and a bad advantage; clipped to 0.8 and 1.3."""
    ratio = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 2.0])
    logprobs = ratio.log().requires_grad_()
    advantages = torch.tensor([1.0, 1, 1, -1, -1, -1])
    losses, clipped = clipped_policy_loss(logprobs, torch.zeros(6), advantages, 0.2, 0.3)
    assert losses.tolist() == pytest.approx([-0.5, -1, -1.3, 0.8, 1, 2])
    assert clipped.tolist() == [False, False, True, True, False, False]
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.5, -1, 0, 0, 1, 2])


def test_a_largest_ratio_bounds_what_a_bad_advantage_can_do():
    logprobs = torch.tensor([10.0, 10.0]).log().requires_grad_()
    advantages = torch.tensor([-1.0, 1.0])
    losses, _ = clipped_policy_loss(logprobs, torch.zeros(2), advantages, max_ratio=3.0)
    assert losses.tolist() == pytest.approx([3, -1.2])
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0, 0]


def test_on_policy_the_gradient_is_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0]).requires_grad_()
    clipped_policy_loss(logprobs, logprobs.detach(), torch.tensor([3.0, -5.0]))[0].sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-3, 5]


def test_penalties_by_their_formulas():
    d = torch.tensor([0.5, -0.5, 0.0])
    assert kl_penalty(d, torch.zeros(3), "mse").tolist() == [0.25, 0.25, 0]
    assert kl_penalty(d, torch.zeros(3), "k2").tolist() == [0.125, 0.125, 0]
    wanted = [math.exp(-0.5) + 0.5 - 1, math.exp(0.5) - 0.5 - 1, 0]
    assert kl_penalty(d, torch.zeros(3), "k3").tolist() == pytest.approx(wanted)
    assert kl_penalty(d, torch.zeros(3), "none").tolist() == [0, 0, 0]


def test_k3_is_the_divergence_on_average():
    """Weighed by the policy's probabilities, it is the sum of p log(p / q)."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    estimate = (p * kl_penalty(p.log(), q.log(), "k3")).sum()
    assert estimate.item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "total", "count"),
    [("grpo", 2 / 2 + 7 / 1, 2), ("bnpo", 9, 3), ("dapo", 9, 5.5), ("dr_grpo", 9, 20)],
)
def test_what_is_summed_and_what_divides_it(aggregation, total, count):
    """Completions of two tokens and of one, ten tokens at most, 11 tokens in two micro-batches."""
    losses, lengths = torch.tensor([0.5, 1.5, 7.0]), torch.tensor([2, 2, 1])
    assert sum_over_tokens(losses, lengths, aggregation).item() == pytest.approx(total)
    counted = window_count(
        aggregation, num_completions=2, num_tokens=3, rollout_tokens=5.5, max_completion=10
    )
    assert counted == count
