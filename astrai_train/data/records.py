"""Files into records, one after the other."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from astrai_train.data.record import Record, Stage, place_word

DOCUMENT_END = "<|endoftext|>"
"""A line of a text file that holds only this ends a document and begins the next."""

_JSON_LINES = (".jsonl", ".ndjson")
_TEXT = (".txt", ".text", ".md")
_PREPARED = (".h5", ".hdf5")
SUFFIXES = (*_JSON_LINES, ".json", *_TEXT)


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
    if suffix == ".parquet":
        raise ValueError(
            f"{path} is Parquet, which needs a library this project does without; convert it: "
            "python -c \"import pandas; pandas.read_parquet('in.parquet')"
            ".to_json('out.jsonl', orient='records', lines=True, force_ascii=False)\""
        )
    if suffix in _PREPARED:
        raise ValueError(f"{path} is already prepared; give the records it was made from")
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: cannot tell what it is; name it one of {', '.join(SUFFIXES)}")


def read_records(path: Path) -> Iterator[Record]:
    """Read one file, JSON lines and text without holding all of it.

    Raises:
        ValueError: a line is not JSON, not an object or not UTF-8.
    """
    check_readable(path)
    suffix = path.suffix.lower()
    if suffix in _JSON_LINES:
        yield from _json_lines(path)
    elif suffix == ".json":
        yield from _json_array(path)
    else:
        yield from _documents(path)


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line, size in _lines(path):
        if line.strip():
            try:
                content = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                where = f"{path} line {number}"
                raise ValueError(f"{where} is not JSON: {_reason(error)}") from None
            yield _record(path, number, content, size)


def _json_array(path: Path) -> Iterator[Record]:
    text = "".join(line for _, line, _ in _lines(path))
    try:
        items = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON: {_reason(error)}; a file with one record a line is named .jsonl"
        ) from None
    if not isinstance(items, list):
        raise ValueError(f"{path} must hold a list of records: [{{...}}, ...]")
    for number, content in enumerate(items, 1):
        yield _record(path, number, content, path.stat().st_size // len(items))


def _documents(path: Path) -> Iterator[Record]:
    document = _Document(path, 1)
    found = False
    for number, line, size in _lines(path):
        if line.strip() == DOCUMENT_END:
            if not document.is_blank:
                found = True
                yield document.record()
            document = _Document(path, number + 1)
        else:
            document.lines.append(line)
            document.size += size
    if not document.is_blank or not found:
        yield document.record()


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

    def record(self) -> Record:
        text = "".join(self.lines).strip("\r\n")
        return Record(file=self.file, line=self.first_line, content={"text": text}, size=self.size)


def _lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """Number, text and bytes of each line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} line {number} is not UTF-8: byte {error.start + 1} is "
                    f"{line[error.start]:#04x}; convert it, say: iconv -f gb18030 -t utf-8"
                ) from None
            yield number, text, len(line)


def _reason(error: json.JSONDecodeError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    line = f"line {error.lineno} " if error.lineno > 1 else ""
    return f"{error.msg} at {line}column {error.colno}"


def _record(path: Path, number: int, content: object, size: int) -> Record:
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} {place_word(path)} {number} must be an object {{...}}, not {content!r:.40}"
        )
    return Record(file=path, line=number, content=content, size=size)


def guess_stage(path: Path) -> Stage:
    """The stage that the first record of a file is of.

    Raises:
        ValueError: the file is empty, or its first record is of no stage.
    """
    first = next(read_records(path), None)
    if first is None:
        raise ValueError(f"{path} holds no record")
    return first.stage or "seq"
