"""Whether this machine can compile a model, and where the compiler keeps what it built."""

import os
import shutil
import sysconfig
from pathlib import Path


def missing_compiler() -> str | None:
    """What torch.compile lacks on this machine, or None when it lacks nothing."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"no Python headers ({header})"
    return None


def use_private_cache() -> Path:
    """Keep the compiler's results in a folder that nobody else can write; call before compiling.

    The cache holds code and pickles that are loaded again, and torch's own place for it is a
    guessable name in the shared temporary folder. TORCHINDUCTOR_CACHE_DIR, where set, is kept.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_cache("compiled"))
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def private_cache(name: str) -> Path:
    """Make a folder for what is loaded and run again, which nobody else can write.

    Raises:
        OSError: there is no such place, or it is not ours.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "astrai" / name
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # also where an older run left it open; fails if it is not ours
    return folder
