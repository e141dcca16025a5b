import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from astrai_train.schedules import ScheduleConfig, cosine, count_steps, wsd


def test_warm_up_starts_at_one_part_and_ends_at_the_peak():
    factors = [cosine(step, 100, 4, 0.1) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_after_warm_up_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    for step in range(10, 100):
        assert cosine(step, 100, 10, 0.1) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_the_end_is_the_floor_and_stays_so():
    for name in ("cosine", "wsd"):
        factor = ScheduleConfig(name=name, warmup_steps=5, min_ratio=0.2).factor(50)
        assert factor(50) == factor(80) == pytest.approx(0.2)


def test_wsd_is_flat_and_then_falls_by_the_root():
    factors = [wsd(step, 100, 10, 20, 0.0) for step in range(101)]
    assert factors[9:81] == [1.0] * 72
    assert factors[85] == pytest.approx(1 - math.sqrt(5 / 20))
    assert factors[100] == 0


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
