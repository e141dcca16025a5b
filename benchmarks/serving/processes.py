"""Servers as their users start them: processes, when they first answered, what memory they took."""

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving.client import ask


@dataclass(kw_only=True)
class Running:
    """A server that has answered."""

    url: str
    first_answer_seconds: float
    """From the start of the process to the first token of its first answer."""
    peak_memory_mb: float = 0.0
    """Set when it has been stopped."""
    log: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serving(
    command: Sequence[str | Path],
    port: int,
    model: str,
    environment: Mapping[str, str] | None = None,
    patience: float = 300,
) -> Iterator[Running]:
    """Run a server until the block is left.

    Raises:
        RuntimeError: it ends or does not answer in time; the message has what it said last.
    """
    log = Path(tempfile.gettempdir()) / f"astrai-benchmark-{port}.log"
    began = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
    running = Running(url=f"http://127.0.0.1:{port}", first_answer_seconds=0)
    try:
        _wait(process, running, model, began + patience, log)
        running.first_answer_seconds = time.perf_counter() - began
        yield running
    finally:
        running.peak_memory_mb = peak_memory_mb(process.pid)
        running.log = log.read_text(errors="replace").splitlines()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.unlink()


def _wait(process: subprocess.Popen, running: Running, model: str, until: float, log: Path) -> None:
    last: Exception | None = None
    while time.perf_counter() < until:
        if process.poll() is not None:
            break
        try:
            asyncio.run(ask(running.url, model, [400, 401, 402, 403], 3))
            return
        except (OSError, RuntimeError, asyncio.IncompleteReadError) as error:
            last = error  # not there yet, or still loading
            time.sleep(0.02)
    said = " | ".join(log.read_text(errors="replace").splitlines()[-3:])
    raise RuntimeError(f"the server did not answer ({last!r}); it said: {said}")


def peak_memory_mb(pid: int) -> float:
    """Most memory that a process and its children ever held, each by itself."""
    total, waiting = 0.0, [pid]
    while waiting:
        one = waiting.pop()
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{one}/status").read_text()
            found = re.search(r"VmHWM:\s+(\d+)", status)
            total += int(found[1]) / 1024 if found else 0
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                waiting += map(int, children.read_text().split())
    return total


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
