"""Memory of matrices that come and go while a model is read."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from astrai_core.model.allocator import into_large_pages

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


def test_what_moves_into_large_pages_keeps_its_numbers_and_type():
    torch.manual_seed(0)
    sizes = (100, 0, 5 << 20, 3, 9 << 20, 7 << 20, 1000)
    tensors = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes]
    tensors += [torch.randn(7, 13), torch.nn.Parameter(torch.randn(3, 5).bfloat16())]
    turned = torch.randn(4, 6).t()
    wanted = [tensor.clone() for tensor in tensors]
    before = large_pages()
    if before is None:
        pytest.skip("a system without large pages")
    pieces = sum(1 for _ in into_large_pages([*tensors, turned]))
    assert pieces == 2
    for tensor, one in zip(tensors, wanted, strict=True):
        assert torch.equal(tensor, one)
        assert tensor.dtype == one.dtype
        assert tensor.data_ptr() % 64 == 0
    after = large_pages()
    assert after is not None
    assert after >= before + (16 << 20)


def large_pages():
    """Bytes of this process that lie in large pages; None if the system gives none when asked."""
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not offered.exists() or "[never]" in offered.read_text():
        return None
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(1024 * int(size) for size in re.findall(r"AnonHugePages: *(\d+)", text))
