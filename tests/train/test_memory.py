"""Memory that a run does not need goes back to the system, and what it needs does not."""

import gc
from typing import Any

import pytest
import torch

from astrai_core.model.allocator import resident_memory, return_free_memory
from astrai_train.callbacks.memory import FreeMemory

NONE: Any = None
MB = 1_000_000


def looks(sizes):
    """How often memory went back, where each look found so much of it, in MB."""
    found, returned = iter(sizes), []
    callback = FreeMemory(lambda: next(found) * MB, lambda: returned.append(1) or True)
    for n in range(32 * len(sizes)):
        callback.on_train_batch_end(NONE, NONE, None, {}, n)
    return len(returned)


@pytest.mark.parametrize(
    ("sizes", "times"),
    [
        ([9000, 3000, 3100, 3200, 3700, 3700], 0),
        ([9000, 3000, 3800, 3000, 3700], 1),
        ([9000, 3000, 3800, 3000, 3800, 3000], 2),
        ([9000, 1000, 2000, 2000, 2100, 2100, 2000], 1),  # it needs more than it did
        ([9000, 300, 500, 500, 500], 0),  # too little to matter
    ],
)
def test_memory_goes_back_once_a_run_has_grown_by_a_quarter(sizes, times):
    assert looks(sizes) == 1 + times  # once after the first batches, whatever there is


def test_a_system_that_tells_nothing_is_left_alone():
    callback = FreeMemory(lambda: None, lambda: pytest.fail("nothing is known to be free"))
    for n in range(64):
        callback.on_train_batch_end(NONE, NONE, None, {}, n)


def test_the_holes_of_the_heap_go_back():
    if not return_free_memory():
        pytest.skip("no glibc")
    # too small for mappings of their own, with something that stays behind each
    kept, holes = [], []
    for _ in range(2000):
        holes.append(torch.ones(16_000))  # 64 kB
        kept.append(torch.ones(16))
    full = resident_memory()
    assert full is not None
    holes.clear()
    gc.collect()
    return_free_memory()
    left = resident_memory()
    assert left is not None
    assert full - left > 0.8 * 2000 * 64_000
    assert all(one.sum() == 16 for one in kept)
