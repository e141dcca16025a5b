"""Nothing is lost, mixed up or left over, whatever happens in whatever order."""

import logging

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from .engine_machine import STAGES, EngineMachine

MUST_HAPPEN = {
    *(f"cancelled while {stage}" for stage in STAGES),
    *(f"ended by {reason}" for reason in ("stop", "length", "cancelled", "error")),
    "sent back",
    "cut prompts",
    "prefix hits",
    "samples that share pages",
    "stop strings",
    "prompt logprobs",
    "changed weights",
    "refused",
    "failed",
    "a draft right",
    "a draft partly right",
    "a draft wrong",
    "an end inside a draft",
}


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL, "astrai_serve.engine.core")  # it logs each broken step


def run(machine, **changes):
    run_state_machine_as_test(
        machine,
        settings=settings(
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            **changes,
        ),
    )


@pytest.mark.parametrize(
    "limits",
    [
        {"max_examples": 200, "stateful_step_count": 40, "derandomize": True},
        pytest.param(
            {"max_examples": 3000, "stateful_step_count": 80, "database": None, "print_blob": True},
            marks=[pytest.mark.slow, pytest.mark.timeout(3600)],
        ),
    ],
    ids=["shortly", "at length"],
)
def test_the_books_are_right_and_every_answer_is_the_models(limits):
    class Machine(EngineMachine):
        seen = EngineMachine.seen.copy()

    run(Machine, **limits)
    missing = {what for what in MUST_HAPPEN if not Machine.seen[what]}
    assert not missing, "this never happened, so that nothing is known of it"
