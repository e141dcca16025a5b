"""Reward functions, and how they are asked."""

from astrai_train.rewards.answers import checked_answer, final_answer, reasoning_gym_score
from astrai_train.rewards.form import Matches, ShortEnough, has_conclusion
from astrai_train.rewards.judging import (
    Completion,
    RewardFunction,
    judge,
    reward_names,
    weighted_sum,
)

__all__ = [
    "Completion",
    "Matches",
    "RewardFunction",
    "ShortEnough",
    "checked_answer",
    "final_answer",
    "has_conclusion",
    "judge",
    "reasoning_gym_score",
    "reward_names",
    "weighted_sum",
]
