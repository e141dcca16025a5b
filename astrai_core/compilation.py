"""Whether this machine can compile a model, and where the compiler keeps what it built."""

import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

_TRIAL = """\
#include <vector>
#include <Python.h>
extern "C" int one() { return 1; }
"""


@functools.cache
def missing_compiler() -> str | None:
    """What torch.compile lacks on this machine, or None when it lacks nothing."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"no Python headers ({header})"
    return _failure(compiler, header.parent)


def _failure(compiler: str, headers: Path) -> str | None:
    """Whether the compiler makes a library of a small source; one without its headers does not."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "trial.so"
        command = [compiler, "-x", "c++", "-", "-shared", "-fPIC", "-I", str(headers)]
        done = subprocess.run(
            [*command, "-o", str(made)], input=_TRIAL, capture_output=True, text=True
        )
        if done.returncode == 0 and made.is_file():
            return None
    said = first_error(done.stderr)
    return f"a C++ compiler that fails ({compiler}{': ' + said if said else ''})"


def first_error(output: str) -> str:
    """The first line of a compiler's output that speaks of an error; empty where none does."""
    return next((line for line in output.splitlines() if "error" in line), "")


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
