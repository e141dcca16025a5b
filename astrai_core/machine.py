"""What this process may use of the machine: cores, processor, memory.

A container's limits are its control group's, of which the usual calls know nothing. A group's limit
holds for all groups in it, so the groups are looked at from the process's own one up to the root.
"""

import hashlib
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Cores:
    """Where threads may run."""

    mask: tuple[int, ...]
    """Numbers of the cores that the process may use."""
    physical: int
    """How many of them are cores of their own; two threads of one core share its arithmetic."""
    quota: float | None = None
    """Seconds of all cores together in each second; None is no limit."""

    @property
    def most(self) -> int:
        """Most threads that can run at once.

        Beyond a quota, threads are stopped in the middle of a loop and the others wait for them.
        """
        return max(1, min(len(self.mask), math.floor(self.quota or len(self.mask))))


def cores(root: Path = Path("/")) -> Cores:
    """Read the affinity mask, the control group's quota and which cores are siblings."""
    if hasattr(os, "sched_getaffinity"):
        mask = tuple(sorted(os.sched_getaffinity(0)))
    else:
        mask = tuple(range(os.cpu_count() or 1))
    return Cores(mask=mask, physical=_num_physical(root, mask), quota=_quota(root))


def processor(root: Path = Path("/")) -> str:
    """The processor's name, and a digest of what it can."""
    text = _read(root / "proc/cpuinfo")
    found: dict[str, str] = {"model name": "", "flags": "", "Features": ""}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in found and not found[key.strip()]:
            found[key.strip()] = value.strip()
    name = found["model name"] or platform.processor() or platform.machine()
    flags = " ".join(sorted((found["flags"] or found["Features"]).split()))
    return f"{name} {hashlib.sha256(flags.encode()).hexdigest()[:16]}"


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be taken, within the control group's limit; None if nobody tells.

    The kernel counts pages of files as available, for it can read them again. Those that this
    process has mapped (its weights, its libraries) are needed in each step, and are taken off.
    """
    rooms = [_kilobytes(root / "proc/meminfo", "MemAvailable:")]
    for folder in _groups(root, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is None or used is None:
            continue
        fields = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
        files = sum(
            int(fields.get(f"total_{name}", fields.get(name, 0)))
            for name in ("inactive_file", "active_file")
        )
        rooms.append(max(0, limit - used + files))
    known = [room for room in rooms if room is not None]
    mapped = _kilobytes(root / "proc/self/status", "RssFile:") or 0
    return max(0, min(known) - mapped) if known else None


def _num_physical(root: Path, mask: tuple[int, ...]) -> int:
    """Count sibling groups; a core whose siblings are not told counts for itself."""
    folder = root / "sys/devices/system/cpu"
    siblings = {
        _read(folder / f"cpu{core}/topology/thread_siblings_list").strip() or str(core)
        for core in mask
    }
    return len(siblings)


def _quota(root: Path) -> float | None:
    quotas: list[float] = []
    for folder in _groups(root, "cpu"):
        words = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us").strip() or "max",
            _read(folder / "cpu.cfs_period_us").strip() or "0",
        ]
        if words[0] not in ("max", "-1") and len(words) == 2 and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, for one controller."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if names:  # the older kind has a tree for each controller
            if controller not in names.split(","):
                continue
            base /= controller
        group = Path(path.lstrip("/"))
        for inner in (group, *group.parents):
            if ".." not in inner.parts and (base / inner).is_dir():
                yield base / inner


def _number(*files: Path) -> int | None:
    """The number in the first of the files that is there; None where it is no limit."""
    for file in files:
        text = _read(file).strip()
        if text:
            return int(text) if text.isdigit() else None
    return None


def _kilobytes(file: Path, key: str) -> int | None:
    for line in _read(file).splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None


def _read(file: Path) -> str:
    """The text of a file of the kernel's, or nothing where it has none or keeps it to itself."""
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""
