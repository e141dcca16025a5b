"""Records to one H5 file, on all cores, so that an interrupted run goes on where it was.

The records are cut into parts, always in the same places; each part becomes a small H5 file of its
own beside the result. A part that is there is not done again. The parts belong to a digest of the
inputs and the tokenizer: when one of these changes, everything is done anew.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.record import Record, Stage
from astrai_train.data.records import find_files, read_records
from astrai_train.data.storage import FORMAT_VERSION, H5Storage, Header, Storage, write_h5
from astrai_train.data.tokenizing import Answers

_PART_RECORDS = 8192
_PART_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a worker needs to know besides its records."""

    header: Header
    tokenizer: Path
    digest: str


def prepare(
    inputs: Sequence[Path],
    out: Path,
    *,
    stage: Stage,
    tokenizer: Path,
    answers: Answers = "all",
    workers: int = 0,
    show_progress: bool = False,
) -> bool:
    """Tokenise records into `out`; nothing is done when it was already made of them.

    Args:
        inputs: files of records, and folders of such files.
        out: the file to write; an old one stays until the new one is whole.
        stage: what to keep of a record.
        tokenizer: folder of the tokenizer.
        answers: which answers of conversations are taught.
        workers: processes; 0 takes one for each core.
        show_progress: draw a bar where standard error is a terminal.

    Returns:
        Whether anything was done.

    Raises:
        ValueError: an input is missing or wrong; says file and line.
    """
    if out.suffix.lower() not in (".h5", ".hdf5"):
        raise ValueError(f"{out} must end in .h5, by which readers know it")
    files = find_files(inputs)
    if not files:
        raise ValueError("no input was given")
    header = Header.of(stage, AutoTokenizer.from_pretrained(tokenizer), answers)
    job = _Job(header=header, tokenizer=tokenizer, digest=_digest(files, header))
    if _is_current(out, job.digest):
        return False
    folder = out.with_name(f".{out.name}.parts-{job.digest[:16]}")
    for stale in set(out.parent.glob(f".{out.name}.parts-*")) - {folder}:
        shutil.rmtree(stale)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _bar(sum(file.stat().st_size for file in files), out.name, show_progress) as bar:
            count = _make_parts(files, folder, job, workers or os.cpu_count() or 1, bar)
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
    parts = [H5Storage(_part_path(folder, number)) for number in range(count)]
    write_h5(out, header, Storage.join(parts), job.digest)
    shutil.rmtree(folder)
    return True


def _digest(files: Sequence[Path], header: Header) -> str:
    stats = [(str(file.resolve()), file.stat()) for file in files]
    content = [FORMAT_VERSION, _PART_RECORDS, _PART_BYTES, *astuple(header)]
    content += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _is_current(path: Path, digest: str) -> bool:
    """Whether a whole file of these inputs is there; a damaged one is made again."""
    try:
        return path.exists() and H5Storage(path).inputs == digest
    except ValueError:
        return False


class _Bar(Protocol):
    def __call__(self, size: int) -> None: ...


def _make_parts(files: Sequence[Path], folder: Path, job: _Job, workers: int, bar: _Bar) -> int:
    """Make the parts that are not there and return how many there are."""
    missing = _missing_parts(files, folder, job.digest, bar)
    count = 0
    if workers == 1:
        tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
        for count, records in missing:
            if records:
                bar(_make_part(_part_path(folder, count - 1), records, job, tokenizer))
        return count
    with _pool(job, workers) as pool:
        running: set[Future[int]] = set()
        for count, records in missing:
            if records:
                path = _part_path(folder, count - 1)
                running.add(pool.submit(_make_part_in_worker, path, records))
            if len(running) > 2 * workers:
                running = _collect(running, bar, FIRST_COMPLETED)
        while running:
            running = _collect(running, bar, FIRST_COMPLETED)
    return count


def _missing_parts(
    files: Sequence[Path], folder: Path, digest: str, bar: _Bar
) -> Iterator[tuple[int, list[Record]]]:
    """Number the parts from 1; one that is there comes without records."""
    for number, records in enumerate(_parts(files), 1):
        if _is_current(_part_path(folder, number - 1), digest):
            bar(sum(record.size for record in records))
            yield number, []
        else:
            yield number, records


def _parts(files: Sequence[Path]) -> Iterator[list[Record]]:
    part: list[Record] = []
    size = 0
    for file in files:
        record = None
        for record in read_records(file):
            part.append(record)
            size += record.size
            if len(part) >= _PART_RECORDS or size >= _PART_BYTES:
                yield part
                part, size = [], 0
        if record is None:
            raise ValueError(f"{file} holds no record")
    if part:
        yield part


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.h5"


def _make_part(path: Path, records: list[Record], job: _Job, tokenizer: AutoTokenizer) -> int:
    """Write one part and return how many bytes of input it holds."""
    header = job.header
    storage = Storage.of_records(records, header.stage, tokenizer, header.answers)
    write_h5(path, header, storage, job.digest)
    return sum(record.size for record in records)


_worker: tuple[_Job, AutoTokenizer]
"""Set once in each worker process: loading a tokenizer takes longer than a small part."""


def _start_worker(job: _Job) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    _worker = (job, AutoTokenizer.from_pretrained(job.tokenizer))


def _make_part_in_worker(path: Path, records: list[Record]) -> int:
    job, tokenizer = _worker
    return _make_part(path, records, job, tokenizer)


@contextlib.contextmanager
def _pool(job: _Job, workers: int) -> Iterator[ProcessPoolExecutor]:
    # not forked: the threads of the tokenizer library do not survive that
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (job,))
    try:
        yield pool
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was ended, perhaps for want of memory; try --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(running: set[Future[int]], bar: _Bar, when: str) -> set[Future[int]]:
    done, running = wait(running, return_when=when)
    for future in done:
        bar(future.result())
    return running


@contextlib.contextmanager
def _bar(total: int, what: str, show: bool) -> Iterator[_Bar]:
    if not (show and sys.stderr.isatty()):
        yield lambda size: None  # noqa: ARG005 - a bar that is not drawn
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)
