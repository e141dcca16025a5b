"""Files into records, one after the other."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from astrai_train.data.json_array import json_items
from astrai_train.data.parquet import parquet_rows
from astrai_train.data.record import Record, Stage, place_word

_log = logging.getLogger(__name__)

DOCUMENT_END = "<|endoftext|>"
"""A line of a text file that holds only this ends a document and begins the next."""

_JSON_LINES = (".jsonl", ".ndjson")
_TEXT = (".txt", ".text", ".md")
_PREPARED = (".h5", ".hdf5")
SUFFIXES = (*_JSON_LINES, ".json", ".parquet", *_TEXT)
LONGEST_DOCUMENT = 1 << 20
"""Bytes of a text file's document; a longer one is cut, so that it need not be held whole."""

Unusable = Literal["refuse", "skip"]
"""What happens to a record that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A record that is not used."""

    place: str
    """Its file and line."""
    reason: str


class Unusables(Protocol):
    """What takes records that are not used, as a list does."""

    def append(self, one: LeftOut, /) -> None:
        """Take one."""


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The files to read: those named, and the readable ones in the folders named, by name.

    Raises:
        ValueError: a path does not exist, is of a kind that cannot be read, or a folder has none.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES)
            if not found:
                raise ValueError(f"{path} holds no file ending in {', '.join(SUFFIXES)}")
            files += found
        else:
            check_readable(path)
            files.append(path)
    return files


def check_readable(path: Path) -> None:
    """Refuse a file that `read_records` cannot read.

    Raises:
        ValueError: it is not there, or of another kind; the message says what to do.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if suffix in _PREPARED:
        raise ValueError(f"{path} is already prepared; give the records it was made from")
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: cannot tell what it is; name it one of {', '.join(SUFFIXES)}")


def read_records(path: Path, unusable: Unusables | None = None) -> Iterator[Record]:
    """Read one file without holding all of it.

    Args:
        path: the file.
        unusable: takes the lines that are no record, which are skipped then; None refuses them.

    Raises:
        ValueError: the file cannot be read, or a line is not JSON, not an object or not UTF-8.
    """
    check_readable(path)
    suffix = path.suffix.lower()
    if suffix in _JSON_LINES:
        yield from _json_lines(path, unusable)
    elif suffix == ".json":
        for number, (content, size) in enumerate(json_items(path), 1):
            yield from _record(path, number, content, size, unusable)
    elif suffix == ".parquet":
        for number, (content, size) in enumerate(parquet_rows(path), 1):
            yield from _record(path, number, content, size, unusable)
    else:
        yield from _documents(path, unusable)


def _json_lines(path: Path, unusable: Unusables | None) -> Iterator[Record]:
    for number, line, size in _lines(path, unusable):
        if line.strip():
            try:
                content = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                _refuse(f"{path} line {number}", f"is not JSON: {_reason(error)}", unusable)
            else:
                yield from _record(path, number, content, size, unusable)


def _documents(path: Path, unusable: Unusables | None) -> Iterator[Record]:
    document = _Document(path, 1)
    before: _Document | None = None  # a part of a document, until it is known whether more follows
    found, num_cuts = False, 0
    for number, line, size in _lines(path, unusable, LONGEST_DOCUMENT):
        is_end = line.strip() == DOCUMENT_END
        if is_end or document.size + size > LONGEST_DOCUMENT:
            if not document.is_blank:
                if before is not None:
                    yield before.record(goes_on=True)
                    num_cuts += 1
                found, before = True, document
            if is_end and before is not None:
                yield before.record()
                before = None
            document = _Document(path, number + is_end)
        if not is_end:
            document.lines.append(line)
            document.size += size
    if before is not None:
        yield before.record(goes_on=not document.is_blank)
        num_cuts += not document.is_blank
    if not document.is_blank or not found:
        yield document.record()
    if num_cuts:
        _log.warning(
            "%s has documents longer than %d bytes, which were cut in %d places; a line that holds "
            "only %s marks the end of a document",
            path,
            LONGEST_DOCUMENT,
            num_cuts,
            DOCUMENT_END,
        )


class _Document:
    """The lines of a text file up to the next mark."""

    def __init__(self, file: Path, first_line: int) -> None:
        self.file = file
        self.first_line = first_line
        self.lines: list[str] = []
        self.size = 0

    @property
    def is_blank(self) -> bool:
        return not any(line.strip() for line in self.lines)

    def record(self, goes_on: bool = False) -> Record:
        text = "".join(self.lines).strip("\r\n")
        return Record(
            file=self.file,
            line=self.first_line,
            content={"text": text},
            size=self.size,
            goes_on=goes_on,
        )


def _lines(
    path: Path, unusable: Unusables | None, longest: int | None = None
) -> Iterator[tuple[int, str, int]]:
    """Number, text and bytes of each line; one with more bytes than `longest` comes in pieces."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1) if longest is None else _cut_lines(file, longest):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                _refuse(
                    f"{path} line {number}",
                    f"is not UTF-8: byte {error.start + 1} is {line[error.start]:#04x}; convert "
                    "it, say: iconv -f gb18030 -t utf-8",
                    unusable,
                )
            else:
                yield number, text, len(line)


def _cut_lines(file: BinaryIO, longest: int) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line, or of pieces of one that end between two characters."""
    number, rest = 1, b""
    while read := file.readline(longest - len(rest)):
        line, rest = rest + read, b""
        is_whole = line.endswith(b"\n")
        if not is_whole and (begun := _BEGUN_CHARACTER.search(line, max(len(line) - 3, 0))):
            # at the end of the file there is no more of it, and decoding will say so
            more = file.read(1)
            file.seek(-len(more), os.SEEK_CUR)
            if more:
                line, rest = line[: begun.start()], begun[0]
        yield number, line
        number += is_whole


_BEGUN_CHARACTER = re.compile(
    rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z"
)
"""The first bytes of a UTF-8 character that lacks its last."""


def _refuse(place: str, reason: str, unusable: Unusables | None) -> None:
    if unusable is None:
        raise ValueError(f"{place} {reason}") from None
    unusable.append(LeftOut(place=place, reason=reason))


def _reason(error: json.JSONDecodeError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    line = f"line {error.lineno} " if error.lineno > 1 else ""
    return f"{error.msg} at {line}column {error.colno}"


def _record(
    path: Path, number: int, content: object, size: int, unusable: Unusables | None
) -> Iterator[Record]:
    if isinstance(content, dict):
        yield Record(file=path, line=number, content=content, size=size)
    else:
        place = f"{path} {place_word(path)} {number}"
        _refuse(place, f"must be an object {{...}}, not {content!r:.40}", unusable)


def guess_stage(path: Path) -> Stage:
    """The stage that the first record of a file is of.

    Raises:
        ValueError: the file is empty, or its first record is of no stage.
    """
    first = next(read_records(path), None)
    if first is None:
        raise ValueError(f"{path} holds no record")
    return first.stage or "seq"
