"""The policy-gradient losses of GRPO and its relatives.

n tokens of completions, laid end to end; N completions. Each token carries the number of its
completion, so that completions of any length need no padding.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

AdvantageScale = Literal["group", "batch", "none"]
Aggregation = Literal["grpo", "bnpo", "dapo", "dr_grpo"]
KL = Literal["none", "mse", "k2", "k3"]

STD_EPSILON = 1e-4
"""Added to a standard deviation before it divides."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The objective.

    Raises:
        ValueError: a value is out of its range, or two contradict each other.
    """

    clip_low: float = 0.2
    """A probability's ratio to the old policy counts down to 1 minus this."""
    clip_high: float = 0.2
    """It counts up to 1 plus this."""
    max_ratio: float | None = None
    """Bounds the ratio also where the advantage is negative; null sets no bound."""
    aggregation: Aggregation = "dapo"
    """What the sum over tokens is divided by: grpo takes the mean of each completion and then of
    completions; bnpo divides by the tokens of the optimizer step, dapo by those of the rollout over
    its optimizer steps, dr_grpo by completions times rollout.max_completion."""
    advantage_scale: AdvantageScale = "group"
    """What a reward's distance from its group's mean is divided by: the standard deviation of the
    group, of the batch, or none."""
    kl: KL = "none"
    """Penalty for leaving the reference, with d = log pi - log pi_ref: mse is d^2, k2 half of it,
    k3 is exp(-d) + d - 1."""
    kl_weight: float = 0.0
    """Of the penalty (often called beta)."""
    ratio_to: Literal["rollout", "reference"] = "rollout"
    """What the ratio is taken to: the policy that rolled out, or the reference."""
    sync_interval: int = 0
    """Optimizer steps after which the reference becomes what the policy is then; 0 never."""
    mask_truncated: bool = False
    """Whether completions that did not end by themselves are left out."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                "policy.clip_low must be from 0 to 1 and policy.clip_high at least 0, not "
                f"{self.clip_low} and {self.clip_high}"
            )
        if self.max_ratio is not None and self.max_ratio < 1 + self.clip_high:
            raise ValueError(
                f"policy.max_ratio {self.max_ratio} must be at least 1 + policy.clip_high "
                f"{self.clip_high}"
            )
        if (self.kl == "none") != (self.kl_weight == 0) or self.kl_weight < 0:
            raise ValueError(
                f"policy.kl {self.kl} and policy.kl_weight {self.kl_weight} contradict each other: "
                "give a form and a weight above 0, or none and 0"
            )
        if self.sync_interval < 0 or (self.sync_interval and not self.needs_reference):
            raise ValueError(
                f"policy.sync_interval {self.sync_interval} needs a reference: set policy.kl or "
                "policy.ratio_to: reference, or leave it 0"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of a reference are asked for."""
        return self.kl != "none" or self.ratio_to == "reference"


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    scale: AdvantageScale = "group",
    batch_std: Tensor | None = None,
) -> Tensor:
    """How much better each completion is than the others of its prompt.

    Args:
        rewards: (N,), NaN where nothing could judge a completion; such a one has no advantage and
            does not count in its group.
        groups: (N,) int64, the number of the prompt that a completion belongs to.
        scale: what the difference from the group's mean is divided by: the standard deviation
            (unbiased) of the group or of all rewards of the batch, or nothing.
        batch_std: the latter, where the batch is spread over ranks; else it is computed.

    Returns:
        (N,) float64. All rewards of a group alike give exactly 0.

    Raises:
        ValueError: a group has one member, which nothing can be compared with.
    """
    sizes = torch.bincount(groups)
    if (sizes == 1).any():
        raise ValueError(
            f"prompt {int((sizes == 1).nonzero()[0])} has one completion only: an advantage "
            "compares at least two of the same prompt"
        )
    mean, std = _group_statistics(rewards.double(), groups, len(sizes))
    difference = (rewards.double() - mean[groups]).masked_fill(~(std[groups] > 0), 0)
    if scale == "group":
        difference = difference / (std[groups] + STD_EPSILON)
    elif scale == "batch":
        if batch_std is None:
            batch_std = rewards[~rewards.isnan()].double().std()
        difference = difference / (batch_std + STD_EPSILON)
    return difference.nan_to_num(nan=0.0)


def zero_variance_groups(rewards: Tensor, groups: Tensor) -> tuple[int, int]:
    """Count the groups that teach nothing, their rewards being alike, and all groups."""
    sizes = torch.bincount(groups)
    _, std = _group_statistics(rewards.double(), groups, len(sizes))
    return int(((std == 0) & (sizes > 0)).sum()), int((sizes > 0).sum())


def _group_statistics(rewards: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each group's numbers; 0 where they are alike."""
    known = ~rewards.isnan()
    values, of = rewards[known], groups[known]
    zeros = rewards.new_zeros(count)
    sizes = zeros.index_add(0, of, torch.ones_like(values))
    mean = zeros.index_add(0, of, values) / sizes
    squares = zeros.index_add(0, of, (values - mean[of]).square())
    low = torch.full_like(zeros, torch.inf).scatter_reduce(0, of, values, "amin")
    high = torch.full_like(zeros, -torch.inf).scatter_reduce(0, of, values, "amax")
    std = (squares / (sizes - 1).clamp(min=1)).sqrt()
    # a mean is rounded: equal rewards may seem to differ from it
    return mean, std.masked_fill(low >= high, 0)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_ratio: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The pessimistic one of two surrogates: the ratio times the advantage, clipped and not.

    Args:
        logprobs: (n,), of the policy that learns.
        old_logprobs: (n,), of the policy that the ratio is taken to; no gradient.
        advantages: (n,), each token has its completion's.
        clip_low: the ratio counts down to 1 - clip_low.
        clip_high: the ratio counts up to 1 + clip_high.
        max_ratio: bounds the unclipped ratio too, which otherwise has no limit where the advantage
            is negative; None sets none.

    Returns:
        Losses (n,), and whether the clipped surrogate, which has no gradient, was taken (n,).
    """
    ratio = (logprobs - old_logprobs).exp()
    is_clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | (
        (ratio > 1 + clip_high) & (advantages > 0)
    )
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    if max_ratio is not None:
        ratio = ratio.clamp(max=max_ratio)
    return -torch.minimum(ratio * advantages, bounded * advantages), is_clipped


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, form: KL) -> Tensor:
    """Estimate at each token how far the policy is from the reference.

    With d = log pi - log pi_ref: `mse` is d^2, `k2` is d^2 / 2 and `k3` is exp(-d) + d - 1, which
    is never negative and right on average; `none` is 0.

    Args:
        logprobs: (n,), of the policy.
        reference_logprobs: (n,); no gradient.
        form: which estimate.
    """
    d = logprobs - reference_logprobs
    match form:
        case "mse":
            return d.square()
        case "k2":
            return d.square() / 2
        case "k3":
            return d.neg().expm1() + d
        case "none":
            return torch.zeros_like(d)


def sum_over_tokens(losses: Tensor, completion_lengths: Tensor, aggregation: Aggregation) -> Tensor:
    """Sum the tokens' losses, each with its weight.

    For `grpo` a completion weighs 1, whatever its length; else each token does.

    Args:
        losses: (n,).
        completion_lengths: (n,), the length of the completion that a token belongs to.
        aggregation: see `window_count` for what divides the sum.
    """
    if aggregation == "grpo":
        losses = losses / completion_lengths
    return losses.sum()


def window_count(
    aggregation: Aggregation,
    *,
    num_completions: int,
    num_tokens: int,
    rollout_tokens: float,
    max_completion: int,
) -> float:
    """What a micro-batch adds to the number that divides its accumulation window's sum.

    Args:
        aggregation: `grpo` counts completions; `bnpo` their tokens; `dapo` the tokens of the whole
            rollout, spread evenly over its micro-batches, so that each optimizer step of a rollout
            divides by the same; `dr_grpo` completions of the greatest possible length.
        num_completions: of the micro-batch, masked ones too.
        num_tokens: of the micro-batch that are trained.
        rollout_tokens: tokens of the rollout that are trained, divided by its micro-batches.
        max_completion: most tokens of a completion.
    """
    match aggregation:
        case "grpo":
            return num_completions
        case "bnpo":
            return num_tokens
        case "dapo":
            return rollout_tokens
        case "dr_grpo":
            return num_completions * max_completion
