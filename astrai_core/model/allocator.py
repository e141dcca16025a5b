"""Where tensors lie: what is freed goes back to the system, and what stays lies in large pages.

glibc takes blocks of up to 32 MB from its heap once larger ones have been freed, and a heap shrinks
at its end only. While a model is read, its matrices are copied once or twice, joined and packed,
and the holes that their first forms leave would stay with the process: a third of the weights.
Steps of training leave holes likewise.
"""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGE_PAGE = 2 * 1024 * 1024
_GROUP = 16 * 1024 * 1024
"""Bytes that are moved together, which takes about as long as a step."""
_LINE = 64
"""Bytes of a line of the cache, at which each tensor begins."""
_OWN_MAPPING = 256 * 1024
"""Bytes from which a block is a mapping of its own meanwhile: all of a model but its vectors."""
_LARGEST = 32 * 1024 * 1024
"""What glibc's threshold grows to by itself; for steps, whose buffers are worth keeping."""


def into_large_pages(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Move what stays side by side into pages of 2 MB, some of it for each `next`.

    A step reads all the weights, and looks up where each page of 4 kB lies: reading them one token
    at a time takes up to a tenth longer. Made in such pages at once they would be there later,
    where the system has to find and clear them first.

    Where there are no such pages nothing is done, and where there is no room for them others are
    taken.

    Args:
        tensors: of any device and type. They stay the same objects, and their numbers lie elsewhere
            afterwards; nothing may compute with them meanwhile.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        group.append(tensor)
        size += _whole_lines(tensor)
        if size >= _GROUP:
            _move(group, size)
            group, size = [], 0
            yield
    if size:
        _move(group, size)
        yield


def _move(tensors: Sequence[Tensor], size: int) -> None:
    mapping = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(mapping, dtype=torch.uint8)
    at = -room.data_ptr() % _LARGE_PAGE
    for tensor in tensors:
        place = room[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor.data)
        at += _whole_lines(tensor)


def _whole_lines(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _LINE) * _LINE


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


@contextlib.contextmanager
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
        return_free_memory()
