"""What is left of a run, from moments that the tests make up."""

import pytest

from astrai_train.pace import Pace


def test_nothing_is_said_of_fewer_than_two_moments():
    pace = Pace()
    assert pace.seconds_left(10, 0.0) is None
    pace.record(1, 5.0)
    pace.record(1, 6.0)  # the same step again
    assert pace.seconds_left(10, 7.0) is None


def test_the_first_step_does_not_count_and_the_time_since_the_last_one_does():
    pace = Pace()
    pace.record(1, 500.0)  # the compiler's
    pace.record(2, 502.0)
    assert pace.seconds_left(10, 502.5) == pytest.approx(8 * 2 - 0.5)
    assert pace.seconds_left(10, 1000.0) == 0.0


def test_the_later_half_of_the_run_decides():
    pace = Pace()
    moment = 0.0
    for step in range(1, 101):
        moment += 10.0 if step <= 50 else 1.0
        pace.record(step, moment)
    assert pace.seconds_left(200, moment) == pytest.approx(100 * 1.0, rel=0.1)


def test_validations_between_steps_count():
    pace = Pace()
    moment = 0.0
    for step in range(1, 401):
        moment += 1.0 + (30.0 if step % 20 == 0 else 0.0)
        pace.record(step, moment)
    assert pace.seconds_left(600, moment) == pytest.approx(200 * 2.5, rel=0.05)


def test_a_run_of_very_many_steps_is_told_by_few_moments():
    pace = Pace()
    for step in range(1, 200_001):
        pace.record(step, step * 0.5)
    assert pace.seconds_left(400_000, 100_000.0) == pytest.approx(100_000, rel=0.01)
    assert len(pace._seen) <= 1000


def test_a_run_that_went_back_begins_anew():
    pace = Pace()
    for step in (10, 20, 30):
        pace.record(step, float(step))
    pace.record(5, 100.0)
    assert pace.seconds_left(10, 100.0) is None
