"""Memory of matrices that come and go while a model is read."""

import platform
import subprocess
import sys

import pytest

# in a process of its own: what other tests have done to the heap would count
SCRIPT = """
import contextlib, gc, sys
import psutil, torch
from astrai_core.model.allocator import large_blocks_returned

torch.empty(30_000_000, dtype=torch.int8)  # glibc takes all that is smaller from its heap now
rss = psutil.Process().memory_info
before = rss().rss
with large_blocks_returned() if sys.argv[1] == "returned" else contextlib.nullcontext():
    first, kept = [], []
    for n in range(100):
        first.append(torch.ones(1_000_000 + 1000 * n, dtype=torch.int8))
        kept.append(torch.ones(1000, dtype=torch.int8))
        first.append(torch.ones(1_000_000, dtype=torch.int8))
    del first[::2]  # each of the holes is between two that stay
    gc.collect()
print(rss().rss - before)
"""


def growth(kind):
    done = subprocess.run([sys.executable, "-c", SCRIPT, kind], capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its allocator")
def test_freed_matrices_leave_no_holes():
    assert growth("usual") > 180e6  # else this test shows nothing
    assert 100e6 < growth("returned") < 115e6
