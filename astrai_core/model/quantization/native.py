"""Our own kernels: compiled once for this machine's processor, kept in a private folder.

Compiling takes seconds, loading what was compiled a moment. Where something is missing, torch's
operators do the work, and `missing()` says in words what it was.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from astrai_core.compilation import first_error, private_cache

_SOURCE = Path(__file__).with_name("linear.cpp")
_FLAGS = (
    "-O3", "-march=native", "-std=c++20", "-shared", "-fPIC",
    # rint and the like become instructions, and a product and a sum stay two roundings as in torch
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip
_SECONDS = 300
_HEADERS = Path(__file__).parents[1]  # found by every source, wherever it lies


class NativeError(Exception):
    """Why there are no kernels of our own, in words."""


@functools.cache
def load() -> None:
    """Make the operators `torch.ops.astrai_native.*` exist, compiling them if need be.

    Raises:
        NativeError: this machine cannot; the message says what it lacks.
    """
    load_source(_SOURCE)


def load_source(source: Path) -> None:
    """Make the operators that a C++ file registers exist, compiling it if need be.

    Raises:
        NativeError: as above.
    """
    if not torch.cpu.get_capabilities().get("avx2"):
        raise NativeError("the processor has no AVX2")
    try:
        library = _path(source)
        if not library.is_file():
            _compile(library, source)
        torch.ops.load_library(str(library))
    except OSError as error:
        raise NativeError(f"the compiled kernels cannot be kept or loaded: {error}") from error


def why_not(source: Path) -> str | None:
    """What this machine lacks for the operators of a source, in words; None where they run."""
    try:
        load_source(source)
    except NativeError as error:
        return str(error)
    return None


def adopt() -> None:
    """Run `torch.ops.astrai.*_linear` natively from now on; `load` must have succeeded."""
    _library().astrai_adopt()


def instructions() -> str:
    """Which of the processor's instructions the integer products use, by name."""
    name = _library().astrai_instructions
    name.restype = ctypes.c_char_p
    return name().decode()


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_path(_SOURCE)))


def _path(source: Path) -> Path:
    return private_cache("kernels") / f"{source.stem}-{_fingerprint(source)}.so"


def _compile(library: Path, source: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        missing = os.environ.get("CXX", "g++")
        raise NativeError(f"there is no C++ compiler ({missing}); install g++ for full speed")
    root = Path(torch.__file__).parent
    # another process may be compiling too: the finished file gets its name in one step
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [
            compiler, *_FLAGS, str(source), "-o", str(made), "-I", str(_HEADERS),
            "-isystem", str(root / "include"), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise NativeError(f"{compiler} took longer than {_SECONDS} s") from error
        if done.returncode != 0:
            said = first_error(done.stderr) or "no message"
            raise NativeError(f"{compiler} failed: {said}; install g++ for full speed")
        made.replace(library)


@functools.cache
def _fingerprint(source: Path) -> str:
    """Names what was compiled: by which source and flags, for which torch and processor."""
    facts = (
        source.read_text("utf-8"), _headers(source.parent), _FLAGS, os.environ.get("CXX", ""),
        torch.__version__, sorted(torch.cpu.get_capabilities().items()),
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@functools.cache
def _headers(beside: Path) -> list[str]:
    found = {*_HEADERS.rglob("*.h"), *beside.glob("*.h")}
    return [path.read_text("utf-8") for path in sorted(found)]
