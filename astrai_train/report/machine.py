"""The machine and the versions that figures belong to."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("astrai", "torch", "lightning", "tokenizers", "safetensors", "numpy")


def machine() -> dict[str, str]:
    """Processor, cores, memory, system and graphics card, as far as the system tells."""
    import torch

    facts = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "?"),
        "memory": _memory(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
    }
    if torch.cuda.is_available():
        facts["graphics"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Python and the packages that decide what a run computes."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return f"{size / 1e9:.1f} GB"
    return "unknown"
