"""Tokenised samples on disk (H5) or straight from records (JSON), behind one class.

An H5 file has one group a column, each a flat array `values` and its `offsets`, laid out without
chunks: the values are mapped into memory, not read, so that a file larger than memory trains and
worker processes share what is cached. `origin/lines` says for each sample where it came from.

What a reader would get wrong: the tokenizer and the template are known by the hash of their
content. A folder may move; a changed merge or template makes the file useless and is refused.
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
from numpy.typing import NDArray

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.ragged import Ragged
from astrai_train.data.record import Record, Stage, place_word
from astrai_train.data.records import read_records
from astrai_train.data.tokenizing import Answers, column_names, encode_records, num_samples

FORMAT_VERSION = 1
_PIECE = 1 << 22
"""How many values are copied or checked at a time."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file of samples was made for, and with."""

    stage: Stage
    tokenizer: str
    """`AutoTokenizer.fingerprint`"""
    template: str
    """`ChatTemplate.fingerprint`; empty where there is none."""
    answers: Answers = "all"

    @classmethod
    def of(cls, stage: Stage, tokenizer: AutoTokenizer, answers: Answers = "all") -> "Header":
        """The header of what this tokenizer makes now."""
        template = tokenizer.chat_template
        return cls(
            stage=stage,
            tokenizer=tokenizer.fingerprint,
            template=template.fingerprint if template else "",
            answers=answers,
        )

    def check(self, wanted: "Header", file: str) -> None:
        """Refuse a file that was made for another stage, or with other ids or another template.

        Raises:
            ValueError: says which of them changed.
        """
        if self.stage != wanted.stage:
            raise ValueError(
                f"{file} was prepared for stage {self.stage}, not {wanted.stage}: prepare the "
                f"records again with --stage {wanted.stage}, or train stage {self.stage}"
            )
        changed = []
        if self.tokenizer != wanted.tokenizer:
            changed.append(_changed("tokenizer", self.tokenizer, wanted.tokenizer))
        if self.stage != "seq" and self.template != wanted.template:
            changed.append(_changed("chat template", self.template, wanted.template))
        if changed:
            raise ValueError(
                f"{file} was prepared with {' and '.join(changed)}: "
                "prepare the records again, or name the tokenizer folder it was made with"
            )


def _changed(what: str, there: str, here: str) -> str:
    return f"another {what} ({there[:8] or 'none'} there, {here[:8] or 'none'} here)"


_RECORDS = {"seq": "documents", "sft": "samples", "dpo": "pairs", "grpo": "prompts"}


class Storage:
    """Samples as columns of token ids, from one file or several read as one.

    Args:
        stage: what the samples are for.
        columns: those of the stage, see `tokenizing`.
        sources: the files of records and how many samples came of each, in order.
        lines: for each sample its line in its file.
        cuts: numbers of the documents that go on in the next one, since a text file had one that
            was too long.
    """

    def __init__(
        self,
        stage: Stage,
        columns: Mapping[str, Ragged],
        sources: Sequence[tuple[str, int]],
        lines: NDArray[np.int64],
        cuts: Sequence[int] = (),
    ) -> None:
        self.stage: Stage = stage
        self.columns = dict(columns)
        self.sources = list(sources)
        self.lines = lines
        self.cuts = tuple(cuts)
        self.files: list[Path] = []
        """The files that were opened."""

    @classmethod
    def of_records(
        cls,
        records: Sequence[Record],
        stage: Stage,
        tokenizer: AutoTokenizer,
        answers: Answers = "all",
    ) -> "Storage":
        """Tokenise records.

        Raises:
            ValueError: a record is wrong; says file and line.
        """
        columns = encode_records(records, stage, tokenizer, answers)
        counts = [num_samples(record, stage) for record in records]
        files = groupby(zip(records, counts, strict=True), lambda pair: str(pair[0].file))
        return cls(
            stage,
            columns,
            [(name, sum(count for _, count in group)) for name, group in files],
            np.repeat(np.array([record.line for record in records], dtype=np.int64), counts),
            # only documents are cut, and each of them is one sample
            [number for number, record in enumerate(records) if record.goes_on],
        )

    @classmethod
    def join(cls, parts: Sequence["Storage"]) -> "Storage":
        """Several of one stage, read as one."""
        first, *rest = parts
        if not rest:
            return first
        assert all(part.stage == first.stage for part in rest)
        columns = {
            name: Ragged.join([part.columns[name] for part in parts]) for name in first.columns
        }
        sources = groupby((one for part in parts for one in part.sources), lambda source: source[0])
        counts = [(name, sum(count for _, count in group)) for name, group in sources]
        starts = accumulate(map(len, parts), initial=0)
        cuts = [
            start + cut for start, part in zip(starts, parts, strict=False) for cut in part.cuts
        ]
        lines = np.concatenate([part.lines for part in parts])
        return cls(first.stage, columns, counts, lines, cuts)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    @property
    def input_ids(self) -> Ragged:
        """The tokens of each sample; those of stage seq end with the end-of-text token."""
        return self.columns["input_ids"]

    @property
    def trained(self) -> Ragged:
        """Which tokens are taught; not in stage seq, where it is all but the first."""
        return self.columns["trained"]

    @cached_property
    def record_starts(self) -> NDArray[np.int64]:
        """The first sample of each record."""
        if self.stage == "grpo":
            return np.flatnonzero(self.columns["columns"].lengths)
        return np.arange(0, len(self), 2 if self.stage == "dpo" else 1)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all samples, whatever files they are in."""
        digest = hashlib.sha256()
        for name, column in sorted(self.columns.items()):
            digest.update(name.encode())
            digest.update(column.offsets.data)
            for segment in column.segments:
                digest.update(np.ascontiguousarray(segment).data)
        return digest.hexdigest()

    @property
    def content(self) -> str:
        """How much there is, in words."""
        return f"{len(self.record_starts):,} {_RECORDS[self.stage]}"

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return self.input_ids.total

    @property
    def num_trained_tokens(self) -> int:
        """The tokens that are a label: all but the first of each document, or the taught ones."""
        if self.stage == "seq":
            return self.num_tokens - len(self)
        return sum(int(np.count_nonzero(segment)) for segment in self.trained.segments)

    def place(self, sample: int) -> str:
        """Where a sample came from: file and line."""
        first = 0
        for name, count in self.sources:
            if sample < first + count:
                return f"{name} {place_word(Path(name))} {self.lines[sample]}"
            first += count
        raise IndexError(f"sample {sample} of {first}")


class H5Storage(Storage):
    """A file written by `write_h5`.

    Raises:
        ValueError: the file is not there, damaged, not ours, or of another format version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path} does not exist; `astrai-data prepare --out {path}` makes it")
        try:
            with h5py.File(path, "r") as file:
                version = file.attrs.get("format_version", FORMAT_VERSION)
                if version == FORMAT_VERSION:
                    self._read(file)
        except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path} is damaged or no file of `astrai-data prepare` ({reason}): "
                "delete it and prepare the records again"
            ) from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this program reads {FORMAT_VERSION}: "
                "prepare the records again"
            )

    def _read(self, file: h5py.File) -> None:
        attributes: dict[str, Any] = dict(file.attrs)
        self.header = _header(attributes)
        self.inputs = str(attributes["inputs"])
        super().__init__(
            self.header.stage,
            {name: _read_column(self.path, file, name) for name in column_names(self.header.stage)},
            [(str(name), int(count)) for name, count in json.loads(attributes["sources"])],
            _mapped(self.path, _dataset(file, "origin/lines")),
            read_cuts(file),
        )
        self._trained_tokens = int(attributes["trained_tokens"])
        counts = {len(column) for column in self.columns.values()}
        counts |= {len(self.lines), sum(n for _, n in self.sources), int(attributes["samples"])}
        if len(counts) != 1:
            raise ValueError("its columns are of different lengths")

    @property
    def num_trained_tokens(self) -> int:
        """As counted when the file was written."""
        return self._trained_tokens


class JSONStorage(Storage):
    """A file of records, tokenised when opened and kept in memory.

    Raises:
        ValueError: a record is wrong; says file and line.
    """

    def __init__(
        self, path: Path, stage: Stage, tokenizer: AutoTokenizer, answers: Answers = "all"
    ) -> None:
        whole = Storage.of_records(list(read_records(path)), stage, tokenizer, answers)
        super().__init__(stage, whole.columns, whole.sources, whole.lines, whole.cuts)


def open_storage(
    paths: Path | Sequence[Path],
    *,
    stage: Stage,
    tokenizer: AutoTokenizer,
    answers: Answers = "all",
) -> Storage:
    """Open one file or several as one sequence of samples, prepared or not.

    Args:
        paths: `.h5` files, or files of records.
        stage: what the samples are wanted for.
        tokenizer: what H5 files must have been made with, and what reads records.
        answers: which answers of records are taught; in an H5 file that is settled.

    Raises:
        ValueError: a file is missing, damaged, empty, or made for or with something else.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    if not files:
        raise ValueError("no file of samples was given")
    wanted = Header.of(stage, tokenizer, answers)
    parts: list[Storage] = []
    for file in files:
        if file.suffix.lower() in (".h5", ".hdf5"):
            part: Storage = H5Storage(file)
            part.header.check(wanted, str(file))
        else:
            part = JSONStorage(file, stage, tokenizer, answers)
        if not len(part):
            raise ValueError(f"{file} holds no sample")
        parts.append(part)
    storage = Storage.join(parts)
    storage.files = files
    return storage


def write_h5(path: Path, header: Header, storage: Storage, inputs: str = "") -> None:
    """Write samples so that the file is whole or absent.

    Args:
        path: the file; an old one stays until the new one is on the disk.
        header: what the samples were made with.
        storage: the samples.
        inputs: a digest of what they were made from, see `prepare`.
    """
    with whole_file(path) as file:
        file.attrs.update(asdict(header))
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["samples"] = len(storage)
        file.attrs["tokens"] = storage.num_tokens
        file.attrs["trained_tokens"] = storage.num_trained_tokens
        file.attrs["sources"] = json.dumps(storage.sources, ensure_ascii=False)
        file.attrs["inputs"] = inputs
        file.create_dataset("origin/lines", data=storage.lines)
        write_cuts(file, storage.cuts)
        for name, column in storage.columns.items():
            _write_column(file.create_group(name), column)


_CUTS = "origin/cuts"


def write_cuts(file: h5py.File, cuts: Sequence[int]) -> None:
    """Note which documents go on in the next one, if any do."""
    if cuts:
        file.create_dataset(_CUTS, data=np.array(cuts, dtype=np.int64))


def read_cuts(file: h5py.File) -> list[int]:
    """Return what `write_cuts` has noted."""
    return _dataset(file, _CUTS)[...].tolist() if _CUTS in file else []


@contextmanager
def whole_file(path: Path) -> Iterator[h5py.File]:
    """Open a file to write under another name, which it loses once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with _Target(temporary, "w+") as written:
            with h5py.File(written, "w") as file:
                yield file
            if written.error is not None:
                raise OSError(written.error.errno, written.error.strerror, str(path))
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _Target(io.FileIO):
    """What HDF5 writes into; it remembers the first failure, and lets what follows go nowhere.

    HDF5 cannot close a file of which a write has failed, and takes the process down at its end.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of it."""
        left = memoryview(data)
        size = left.nbytes
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size


def _header(attributes: Mapping[str, Any]) -> Header:
    header = Header(**{field.name: str(attributes[field.name]) for field in fields(Header)})  # pyright: ignore[reportArgumentType]
    if header.stage not in get_args(Stage):
        raise ValueError(f"its stage is {header.stage!r}")
    return header


def _write_column(group: h5py.Group, column: Ragged) -> None:
    dtype = np.result_type(*column.segments) if column.segments else np.dtype(np.uint16)
    stored = np.dtype(np.uint8) if dtype == np.bool_ else dtype
    values = group.create_dataset("values", shape=(column.total,), dtype=stored)
    checksum = 0
    for start in range(0, column.total, _PIECE):
        piece = column.flat(start, min(start + _PIECE, column.total)).astype(stored)
        values[start : start + len(piece)] = piece
        checksum = zlib.crc32(piece.data, checksum)
    group.create_dataset("offsets", data=column.offsets)
    group.attrs["crc32"] = zlib.crc32(column.offsets.data, checksum)


def _read_column(path: Path, file: h5py.File, name: str) -> Ragged:
    values, offsets = (_dataset(file, f"{name}/{part}") for part in ("values", "offsets"))
    attributes: dict[str, Any] = dict(file[name].attrs)
    if _checksum(path, offsets, _checksum(path, values, 0)) != int(attributes["crc32"]):
        raise ValueError(f"{name} does not match its checksum")
    flat = _mapped(path, values)
    return Ragged([flat.view(np.bool_) if name == "trained" else flat], _mapped(path, offsets))


def _checksum(path: Path, values: h5py.Dataset, before: int) -> int:
    """The checksum of what is stored, read and not mapped: a process is charged what it maps."""
    offset = values.id.get_offset()
    if offset is None:
        return zlib.crc32(values[...].data, before)
    left = values.size * values.dtype.itemsize
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while left:
            piece = file.read(min(_PIECE, left))
            if not piece:
                raise ValueError("it ends too early")
            before = zlib.crc32(piece, before)
            left -= len(piece)
    return before


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    found = file[name]
    if not isinstance(found, h5py.Dataset) or found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"{name} is not a list of whole numbers")
    return found


def _mapped(path: Path, values: h5py.Dataset) -> NDArray[Any]:
    """The values as a view of the file; those of a repacked file are read."""
    offset = values.id.get_offset()
    if offset is None or offset % values.dtype.itemsize:  # numpy would copy all at each search
        return values[...]
    return np.memmap(path, mode="r", dtype=values.dtype, offset=offset, shape=values.shape)
