"""Where tensors lie: what is freed goes back to the system, and what stays lies in large pages.

glibc takes blocks of up to 32 MB from its heap once larger ones have been freed, and a heap shrinks
at its end only. While a model is read, its matrices are copied once or twice, joined and packed,
and the holes that their first forms leave would stay with the process: a third of the weights.
Steps of training leave holes likewise.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of mman.h; the second one since Linux 6.1
_LARGE_PAGE = 2 * 1024 * 1024
_OWN_MAPPING = 256 * 1024
"""Bytes from which a block is a mapping of its own meanwhile: all of a model but its vectors."""
_LARGEST = 32 * 1024 * 1024
"""What glibc's threshold grows to by itself; for steps, whose buffers are worth keeping."""


def into_large_pages(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Move what stays into pages of 2 MB, one tensor for each `next`.

    A step reads all the weights, and looks up where each page of 4 kB lies: reading them one token
    at a time takes a tenth longer. Made in such pages at once they would be there later, where the
    system has to find and clear them first. What is computed meanwhile goes on.

    Systems without such pages, or without room for them, leave everything as it is.
    """
    if sys.platform != "linux":  # where these numbers are other wishes
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = os.sysconf("SC_PAGE_SIZE")
    for tensor in tensors:
        # the allocator's few bytes before the numbers lie in the same page
        first, end = tensor.data_ptr() // page * page, tensor.data_ptr() + tensor.nbytes
        if tensor.device.type == "cpu" and tensor.nbytes >= _LARGE_PAGE:
            madvise(first, (end - first) // page * page, _MADV_HUGEPAGE)
            madvise(first, (end - first) // page * page, _MADV_COLLAPSE)
            yield


def return_free_memory() -> bool:
    """Give the holes of the heap back; False where there is no glibc, and nothing is done."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        return False
    library.malloc_trim(0)
    return True


def resident_memory() -> int | None:
    """Bytes of memory that this process has; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except FileNotFoundError:  # no Linux
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Give freed matrices back at once, in all threads; where there is no glibc, change nothing."""
    library = ctypes.CDLL(None)
    # others, musl and macOS's among them, have neither this problem nor these two
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST)
        library.malloc_trim(0)
