"""Speeds and durations, against arithmetic done by hand."""

import pytest

from astrai_core.generation import FinishReason, SamplingParams
from astrai_serve.engine.statistics import Histogram, Rate, Statistics
from astrai_serve.engine.task import Task


def task(num_prompt_tokens=4, max_tokens=10):
    return Task(
        task_id=0,
        prompt_ids=tuple(range(num_prompt_tokens)),
        params=SamplingParams(),
        max_tokens=max_tokens,
        seed=0,
        arrived_at=100.0,
    )


def test_a_value_is_counted_under_the_bound_that_it_does_not_exceed():
    histogram = Histogram([1, 2])
    for value in (0.5, 1, 1.5, 2, 9):
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([2, 2, 1], 14)


def test_a_rate_follows_what_was_seen_of_late():
    rate = Rate()
    assert rate.per_second is None
    rate.add(100, 1)
    assert rate.per_second == 100
    for _ in range(400):
        rate.add(50, 1)
    assert rate.per_second == pytest.approx(50, rel=1e-3)


def test_an_expected_speed_holds_until_steps_tell_another():
    statistics = Statistics()
    statistics.step(100, 0, 1.0)
    statistics.expect(prefill=7, decode=50)
    assert statistics.prefill.per_second == 100
    assert statistics.decode.per_second == pytest.approx(50)
    for _ in range(200):
        statistics.step(0, 8, 0.1)
    assert statistics.decode.per_second == pytest.approx(80, rel=0.01)


def test_prefill_is_timed_without_what_was_decoded_beside_it():
    seen = Statistics()
    seen.step(0, 10, 1.0)  # ten tokens a second
    seen.step(100, 2, 0.5)  # by rate 0.2 s are the decoding's, but its share of the step is 2 %
    assert seen.decode.per_second == 10
    assert seen.prefill.per_second == pytest.approx(100 / (0.5 * 100 / 102))


def test_a_task_is_timed_from_arrival_to_end():
    seen, one = Statistics(), task()
    seen.admitted(one, 101.0)
    seen.admitted(one, 105.0)  # comes back after it was sent back
    for now in (103.0, 103.5, 104.5):
        one.token_ids.append(1)
        seen.token(one, now)
    seen.ended(one, one.finish(FinishReason.STOP), 104.5)
    assert seen.request_queue_time_seconds.sum == 1.0
    assert seen.request_prefill_time_seconds.sum == 2.0
    assert seen.time_to_first_token_seconds.sum == 3.0
    assert seen.inter_token_latency_seconds.sum == 1.5
    assert seen.request_decode_time_seconds.sum == 1.5
    assert seen.e2e_request_latency_seconds.sum == 4.5
    assert (seen.request_prompt_tokens.sum, seen.request_generation_tokens.sum) == (4, 3)
    assert seen.answer_tokens == 3


def test_the_time_of_work_is_that_of_its_prompts_and_expected_answers():
    seen = Statistics()
    assert seen.seconds_of([task()]) is None
    seen.step(0, 10, 1.0)
    seen.step(100, 0, 1.0)
    assert seen.seconds_of([task(200, 20)]) == pytest.approx(200 / 100 + 20 / 10)
    seen.answer_tokens = 8.0
    assert seen.seconds_of([task(200, 20)]) == pytest.approx(2 + 0.8)
    late = task(200, 20)
    late.num_computed_tokens = 200
    late.token_ids += [1] * 18
    late.num_computed_tokens += 17
    assert seen.seconds_of([late]) == pytest.approx(2 / 10), "two tokens are left of its twenty"
