"""Records to one H5 file, on all cores, so that an interrupted run goes on where it was.

The records are cut into parts, always in the same places; each part becomes a small H5 file of its
own beside the result. A part that is there is not done again. The parts belong to a digest of the
inputs, the tokenizer and the options: when one of these changes, everything is done anew.

What is left out, as a duplicate or because it cannot be used, is written beside the result with its
file and line: `OUT.left_out.jsonl`.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.duplicates import Duplicates, Seen, Signature, digest, signature, text_of
from astrai_train.data.joining import join_h5
from astrai_train.data.left_out import LeftOutFile, left_out_file
from astrai_train.data.record import Record, Stage
from astrai_train.data.records import LeftOut, Unusable, Unusables, find_files, read_records
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
    unusable: Unusable


def prepare(
    inputs: Sequence[Path],
    out: Path,
    *,
    stage: Stage,
    tokenizer: Path,
    answers: Answers = "all",
    duplicates: Duplicates = "keep",
    unusable: Unusable = "refuse",
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
        duplicates: whether records that repeat an earlier one, exactly or nearly, are left out.
        unusable: whether a record that cannot be used is refused or left out.
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
    job = _Job(
        header=header,
        tokenizer=tokenizer,
        digest=_digest(files, header, duplicates, unusable),
        unusable=unusable,
    )
    if _is_current(out, job.digest):
        return False
    folder = out.with_name(f".{out.name}.parts-{job.digest[:16]}")
    for stale in set(out.parent.glob(f".{out.name}.parts-*")) - {folder}:
        shutil.rmtree(stale)
    folder.mkdir(parents=True, exist_ok=True)
    passes = 1 if duplicates == "keep" else 2
    total = passes * sum(file.stat().st_size for file in files)
    try:
        with (
            _bar(total, out.name, show_progress) as bar,
            _pool(job, workers or os.cpu_count() or 1) as pool,
        ):
            new = _find_new(files, folder, duplicates, unusable, pool, bar)
            with LeftOutFile(left_out_file(out)) as left_out:
                _make_parts(files, folder, job, new, pool, bar, left_out)
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
    parts = sorted(folder.glob("*.h5"))
    if not parts:
        raise ValueError(f"all {left_out.count} records were left out; see {left_out.path}")
    join_h5(parts, out, header, job.digest)
    shutil.rmtree(folder)
    return True


def _digest(
    files: Sequence[Path], header: Header, duplicates: Duplicates, unusable: Unusable
) -> str:
    stats = [(str(file.resolve()), file.stat()) for file in files]
    content = [FORMAT_VERSION, _PART_RECORDS, _PART_BYTES, *astuple(header), duplicates, unusable]
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


def _find_new(
    files: Sequence[Path],
    folder: Path,
    duplicates: Duplicates,
    unusable: Unusable,
    pool: "_Pool",
    bar: _Bar,
) -> NDArray[np.bool_] | None:
    """Tell for each record, in order, whether it repeats no earlier one; None asks for none."""
    if duplicates == "keep":
        return None
    file = folder / "new.npy"
    if file.is_file():
        bar(sum(one.stat().st_size for one in files))
        return np.load(file, allow_pickle=False)
    seen, new = Seen(duplicates), list[NDArray[np.bool_]]()
    skipped = _Forgotten() if unusable == "skip" else None  # told when the parts are made
    texts = (
        ([text_of(record.content) for record in part], sum(record.size for record in part))
        for part in _parts(files, skipped)
    )
    for marks, size in pool.in_order(_marks, ((text, duplicates, size) for text, size in texts)):
        new.append(seen.add(marks))
        bar(size)
    temporary = folder / ".new.npy"
    is_new = np.concatenate([np.zeros(0, dtype=np.bool_), *new])
    np.save(temporary, is_new)
    temporary.replace(file)
    return is_new


class _Forgotten:
    def append(self, one: LeftOut, /) -> None:
        """Take one and forget it."""


def _marks(
    texts: Sequence[str], duplicates: Duplicates, size: int
) -> tuple[list[tuple[bytes, Signature | None]], int]:
    near = duplicates == "near"
    return [(digest(text), signature(text) if near else None) for text in texts], size


def _make_parts(
    files: Sequence[Path],
    folder: Path,
    job: _Job,
    new: NDArray[np.bool_] | None,
    pool: "_Pool",
    bar: _Bar,
    left_out: LeftOutFile,
) -> None:
    """Make the parts that are not there and list what is left out."""

    def missing() -> Iterator[tuple[Path, list[Record]]]:
        first = 0
        unreadable = left_out if job.unusable == "skip" else None
        for number, part in enumerate(_parts(files, unreadable), 1):
            records = part
            if new is not None:
                marked = list(zip(part, new[first : first + len(part)].tolist(), strict=True))
                records = [record for record, is_new in marked if is_new]
                left_out.extend(
                    LeftOut(place=record.place, reason="repeats an earlier record")
                    for record, is_new in marked
                    if not is_new
                )
            first += len(part)
            path = _part_path(folder, number)
            bar(sum(record.size for record in part) - sum(record.size for record in records))
            if not records:
                continue
            if _is_current(path, job.digest):
                left_out.extend(_read_left_out(path))
                bar(sum(record.size for record in records))
            else:
                yield path, records

    for path, size in pool.in_order(_make_part_in_worker, missing()):
        left_out.extend(_read_left_out(path))
        bar(size)


def _parts(files: Sequence[Path], unusable: Unusables | None) -> Iterator[list[Record]]:
    part: list[Record] = []
    size = 0
    for file in files:
        record = None
        for record in read_records(file, unusable):
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
    left_out: list[LeftOut] = []
    try:
        storage = Storage.of_records(records, header.stage, tokenizer, header.answers)
    except ValueError:
        if job.unusable == "refuse":
            raise
        usable = [one for one in records if _is_usable(one, header, tokenizer, left_out)]
        path.with_suffix(".json").write_text(json.dumps([asdict(one) for one in left_out]))
        if not usable:
            return sum(record.size for record in records)
        storage = Storage.of_records(usable, header.stage, tokenizer, header.answers)
    write_h5(path, header, storage, job.digest)
    return sum(record.size for record in records)


def _is_usable(
    record: Record, header: Header, tokenizer: AutoTokenizer, left_out: list[LeftOut]
) -> bool:
    try:
        Storage.of_records([record], header.stage, tokenizer, header.answers)
    except ValueError as error:
        reason = str(error).removeprefix(record.place).lstrip(": ")
        left_out.append(LeftOut(place=record.place, reason=reason))
        return False
    return True


def _read_left_out(part: Path) -> list[LeftOut]:
    file = part.with_suffix(".json")
    return [LeftOut(**one) for one in json.loads(file.read_text())] if file.is_file() else []


_worker: tuple[_Job, AutoTokenizer]
"""Set once in each process that works: loading a tokenizer takes longer than a small part."""


def _start_worker(job: _Job) -> None:
    global _worker
    _worker = (job, AutoTokenizer.from_pretrained(job.tokenizer))


def _start_process(job: _Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    _start_worker(job)


def _end_with_parent() -> None:
    """A worker waits for work from a queue that it holds open itself, for ever if need be."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_part_in_worker(path: Path, records: list[Record]) -> tuple[Path, int]:
    job, tokenizer = _worker
    return path, _make_part(path, records, job, tokenizer)


Result = TypeVar("Result")


class _Pool:
    """Processes, or this one alone."""

    def __init__(self, executor: ProcessPoolExecutor | None, workers: int) -> None:
        self._executor = executor
        self._most = 2 * workers  # so much is read ahead, and not the whole input

    def in_order(
        self, work: Callable[..., Result], each: Iterable[tuple[Any, ...]]
    ) -> Iterator[Result]:
        """Call a function with each of the arguments; results come in their order."""
        if self._executor is None:
            for arguments in each:
                yield work(*arguments)
            return
        running: deque[Future[Result]] = deque()
        for arguments in each:
            running.append(self._executor.submit(work, *arguments))
            if len(running) > self._most:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


@contextlib.contextmanager
def _pool(job: _Job, workers: int) -> Iterator[_Pool]:
    if workers == 1:
        _start_worker(job)
        yield _Pool(None, 1)
        return
    # not forked: the threads of the tokenizer library do not survive that
    executor = ProcessPoolExecutor(workers, get_context("spawn"), _start_process, (job,))
    try:
        yield _Pool(executor, workers)
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was ended, perhaps for want of memory or disk space; free some and "
            "run the same command again, or try --workers 1, which says more"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _bar(total: int, what: str, show: bool) -> Iterator[_Bar]:
    if not (show and sys.stderr.isatty()):
        yield lambda size: None  # noqa: ARG005 - a bar that is not drawn
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)
