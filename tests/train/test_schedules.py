import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LRScheduler,
)

from astrai_train.schedules import ScheduleConfig, cosine, count_steps, sgdr, wsd


def test_warm_up_starts_at_one_part_and_ends_at_the_peak():
    factors = [cosine(step, 100, 4, 0.1) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


def rates(schedule: LRScheduler, steps: int) -> list[float]:
    """What torch makes of a learning rate of 1, step by step."""
    values = []
    for _ in range(steps):
        values.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return values


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def test_cosine_after_warm_up_is_that_of_torch():
    wanted = rates(CosineAnnealingLR(sgd(), T_max=9_900, eta_min=0.1), 9_900)
    ours = [cosine(step, 10_000, 100, 0.1) for step in range(100, 10_000)]
    assert ours == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(("cycle_steps", "mult"), [(70, 1), (13, 1), (10, 2), (1, 2), (7, 3)])
def test_warm_restarts_are_those_of_torch(cycle_steps, mult):
    schedule = CosineAnnealingWarmRestarts(sgd(), cycle_steps, T_mult=mult, eta_min=0.1)
    ours = [sgdr(step, 100, cycle_steps, mult, 0.1) for step in range(100, 10_100)]
    assert ours == pytest.approx(rates(schedule, 10_000), abs=1e-9)


def test_cycles_of_broken_lengths_begin_after_the_sum_of_those_before():
    """Cycles of 8, 12, 18 and 27 steps, so the last of these begins at step 38."""
    factors = [sgdr(step, 0, 8, 1.5, 0.0) for step in range(65)]
    peaks = [step for step, factor in enumerate(factors) if factor == 1]
    assert peaks == [0, 8, 20, 38]
    assert factors[29] == pytest.approx(0.5)


def test_warm_restarts_begin_after_the_warm_up_and_default_to_one_cycle():
    once = ScheduleConfig(name="sgdr", warmup_steps=5).factor(50)
    wanted = [cosine(step, 50, 5, 0.1) for step in range(50)]
    assert [once(step) for step in range(50)] == pytest.approx(wanted)
    restarted = ScheduleConfig(name="sgdr", warmup_steps=5, cycle_steps=10).factor(50)
    assert [restarted(step) for step in (0, 5, 15, 25)] == [0.2, 1, 1, 1]


def test_the_end_is_the_floor_and_stays_so():
    for name in ("cosine", "wsd"):
        factor = ScheduleConfig(name=name, warmup_steps=5, min_ratio=0.2).factor(50)
        assert factor(50) == factor(80) == pytest.approx(0.2)


def test_wsd_is_flat_and_then_falls_by_the_root():
    """Ten thousand steps: 100 of warm-up, 2,000 of cooldown, by the formulas of its paper."""
    rise = torch.arange(1, 101, dtype=torch.float64) / 100
    fall = 1 - (torch.arange(2_000, dtype=torch.float64) / 2_000).sqrt()
    wanted = torch.cat([rise, torch.ones(7_900), fall])
    factors = [wsd(step, 10_000, 100, 2_000, 0.0) for step in range(10_000)]
    assert factors == pytest.approx(wanted.tolist(), abs=1e-12)
    assert wsd(10_000, 10_000, 100, 2_000, 0.0) == 0


def test_wsd_cools_down_for_a_fifth_unless_told():
    assert ScheduleConfig(name="wsd").factor(1000)(801) < 1
    assert ScheduleConfig(name="wsd").factor(1000)(800) == 1
    assert ScheduleConfig(name="wsd", cooldown_steps=50).factor(1000)(950) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, not -1"),
        ({"min_ratio": 1.5}, "min_ratio must be from 0 to 1, not 1.5"),
        ({"total_steps": 0}, "total_steps must be 1 or more"),
        ({"cycle_steps": 5}, "are for the schedule sgdr, not cosine"),
        ({"name": "sgdr", "cycle_mult": 0.5}, "cycle_mult must be 1 or more, not 0.5"),
        ({"name": "sgdr", "cycle_steps": 0}, "cycle_steps must be 1 or more"),
        ({"cooldown_steps": 5}, "cooldown_steps is for the schedule wsd, not cosine"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        ScheduleConfig(**fields)


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "num_batches", "wanted"),
    [(50, -1, None, 50), (-1, 3, 10, 9), (5, 3, 10, 5), (-1, -1, 10, None), (-1, 3, None, None)],
)
def test_the_nearer_bound_ends_a_run(max_steps, max_epochs, num_batches, wanted):
    """Ten micro-batches, four to a step: an epoch has three steps, the last one of two."""
    steps = count_steps(
        max_steps=max_steps, max_epochs=max_epochs, num_batches=num_batches, accumulate=4
    )
    assert steps == wanted
