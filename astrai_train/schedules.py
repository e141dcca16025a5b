"""The learning rate over a run, as pure functions from a step to a factor on `lr`.

Steps count from 0, so the factor of step 0 is what the first update uses. Nothing is carried from
step to step: a resumed run only needs its step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate rises and falls.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    name: Literal["cosine", "wsd", "sgdr"] = "cosine"
    """Half a cosine down from the peak; flat with a cooldown at the end (`wsd`: warm-up, stable,
    decay); or half cosines one after the other (`sgdr`: warm restarts)."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up; the first one has 1/warmup_steps of the peak."""
    min_ratio: float = 0.1
    """Where the schedule ends, as a share of the peak."""
    total_steps: int | None = None
    """Optimizer steps until the end; null takes the trainer's max_steps, or else counts the batches
    of its max_epochs."""
    cooldown_steps: int | None = None
    """wsd: optimizer steps of the decay; null is a fifth of the total."""
    cycle_steps: int | None = None
    """sgdr: optimizer steps of the first cycle, which begins when the warm-up ends; null lets
    it last until the end."""
    cycle_mult: float = 1.0
    """sgdr: how much longer each cycle is than the one before."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, not {self.warmup_steps}")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio must be from 0 to 1, not {self.min_ratio}")
        for name in ("total_steps", "cooldown_steps", "cycle_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, or null, not {value}")
        if self.cooldown_steps is not None and self.name != "wsd":
            raise ValueError(f"cooldown_steps is for the schedule wsd, not {self.name}")
        if self.name != "sgdr" and (self.cycle_steps is not None or self.cycle_mult != 1.0):
            raise ValueError(
                f"cycle_steps and cycle_mult are for the schedule sgdr, not {self.name}"
            )
        if not self.cycle_mult >= 1:
            raise ValueError(f"cycle_mult must be 1 or more, not {self.cycle_mult}")

    def factor(self, total_steps: int) -> Callable[[int], float]:
        """The schedule of a run of `total_steps` optimizer steps."""
        if self.name == "cosine":
            return lambda step: cosine(step, total_steps, self.warmup_steps, self.min_ratio)
        if self.name == "sgdr":
            first = self.cycle_steps or max(1, total_steps - self.warmup_steps)
            return lambda step: sgdr(
                step, self.warmup_steps, first, self.cycle_mult, self.min_ratio
            )
        cooldown = self.cooldown_steps or max(1, total_steps // 5)
        return lambda step: wsd(step, total_steps, self.warmup_steps, cooldown, self.min_ratio)


def warmup(step: int, warmup_steps: int) -> float:
    """Rise linearly from 1/warmup_steps at step 0 to 1, and stay there."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def cosine(step: int, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Warm up, then follow half a cosine from 1 at the end of warm-up to min_ratio at the end.

    The floor is interpolated, not cut off, so the curve has no kink.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2


def sgdr(
    step: int, warmup_steps: int, cycle_steps: int, cycle_mult: float, min_ratio: float
) -> float:
    """Warm up, then follow half a cosine down in each cycle and begin the next one at the peak.

    Cycle n has `cycle_steps * cycle_mult ** n` steps (arXiv 1608.03983).
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    left, length = float(step - warmup_steps), float(cycle_steps)
    if cycle_mult == 1:
        left %= length
    # counted, not by logarithm: at a cycle's edge that is off by one where it rounds
    while left >= length:
        left -= length
        length *= cycle_mult
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * left / length)) / 2


def wsd(
    step: int, total_steps: int, warmup_steps: int, cooldown_steps: int, min_ratio: float
) -> float:
    """Warm up, stay, then cool down as 1 - sqrt of the way done (arXiv 2405.18392)."""
    done = min(1.0, max(0.0, (step - total_steps + cooldown_steps) / cooldown_steps))
    return warmup(step, warmup_steps) * (min_ratio + (1 - min_ratio) * (1 - math.sqrt(done)))


def count_steps(
    *,
    max_steps: int,
    max_epochs: int | None,
    num_batches: int | None,
    accumulate: int,
) -> int | None:
    """Optimizer steps of a run, or None where nothing bounds it.

    Args:
        max_steps: the trainer's; -1 is no bound.
        max_epochs: the trainer's; -1 or None is no bound.
        num_batches: micro-batches of an epoch on each rank, or None where nobody knows.
        accumulate: micro-batches of a step; the last step of an epoch may have fewer.
    """
    bounds = [max_steps] if max_steps > 0 else []
    if num_batches is not None and max_epochs is not None and max_epochs > 0:
        bounds.append(math.ceil(num_batches / accumulate) * max_epochs)
    return min(bounds, default=None)
