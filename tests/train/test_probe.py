import dataclasses
import time

import pytest

from astrai_core.model import ModelConfig
from astrai_train import probe
from astrai_train.optim import OptimizerConfig
from astrai_train.probe import operations_per_token, seconds_per_step

SMALL = ModelConfig(vocab_size=64, dim=16, n_layers=2, dim_ffn=24, n_heads=2)


def test_operations_by_hand():
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 8 + 2 * 16
    scores_and_values = 2 * 2 * (8 + 8) * 10
    by_hand = 6 * (64 * 16 + 2 * layer + 16 + scores_and_values)
    assert operations_per_token(SMALL, 10) == by_hand
    untied = dataclasses.replace(SMALL, tie_weight=False)
    assert operations_per_token(untied, 10) == by_hand


def test_a_step_takes_its_micro_batches_times_as_long():
    one = seconds_per_step(SMALL, 8, 128, 1, OptimizerConfig())
    eight = seconds_per_step(SMALL, 8, 128, 8, OptimizerConfig())
    assert 2 < eight / one < 30


def test_a_giant_is_tried_on_a_slice(monkeypatch):
    """A 70-billion model in seconds: its step is extrapolated to hours."""
    giant = ModelConfig(
        vocab_size=128_000, dim=1024, n_layers=4000, dim_ffn=4096, n_heads=8, tie_weight=False
    )
    monkeypatch.setattr(probe, "_BUDGET", 1e9)
    start = time.perf_counter()
    seconds = seconds_per_step(giant, 64, 4096, 1, OptimizerConfig())
    assert time.perf_counter() - start < 120
    operations = operations_per_token(giant, 4096) * 64 * 4096
    assert 1e7 < operations / seconds < 1e13


@pytest.mark.parametrize(("rows", "length"), [(1, 32), (64, 512)])
def test_the_slice_stays_within_the_budget(rows, length):
    sliced, few_rows, short = probe._slice(SMALL, rows, length, 1e8)
    assert operations_per_token(sliced, short) * few_rows * short <= 1e8
    assert few_rows <= rows
    assert short <= length
