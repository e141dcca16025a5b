"""Chores: small ones take a twentieth of the time beside tasks, large ones wait."""

import pytest

from astrai_serve.engine.chores import Chores


class Clock:
    """Seconds, which pass while work is done."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def work(self, seconds, pieces):
        """So many pieces of work."""
        for _ in range(pieces):
            self.now += seconds
            yield


def test_small_work_takes_a_twentieth_of_the_time_between_steps():
    clock = Clock()
    chores = Chores(clock)
    chores.add(clock.work(0.03, 1000), is_small=True)
    spent = 0.0
    for _ in range(2000):
        clock.now += 0.01  # a step
        began = clock.now
        chores.between_steps()
        spent += clock.now - began
    assert spent / (clock.now - 100) == pytest.approx(0.05, rel=0.05)


def test_large_work_is_left_alone_between_steps_and_comes_last():
    clock = Clock()
    chores, done = Chores(clock), []

    def note(name):
        done.append(name)
        yield

    chores.add(note("large"), is_small=False)
    chores.between_steps()
    assert not done
    chores.add(note("small"), is_small=True)
    while chores:
        chores.while_idle()
    assert done == ["small", "large"]


def test_work_that_fails_is_dropped(caplog):
    chores = Chores()

    def work():
        yield
        raise ArithmeticError("in vain")

    chores.add(work(), is_small=True)
    chores.while_idle()
    chores.while_idle()
    assert "in vain" in caplog.text
    assert not chores
