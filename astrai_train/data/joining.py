"""Several H5 files into one, with no more of them in memory than a piece."""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from astrai_train.data.storage import FORMAT_VERSION, Header, read_cuts, whole_file, write_cuts
from astrai_train.data.tokenizing import column_names

_PIECE = 1 << 20
"""How many values are copied at a time."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What must be known of a file before the first value is copied."""

    samples: int
    tokens: int
    trained_tokens: int
    sources: list[tuple[str, int]]
    totals: dict[str, int]
    """Values of each column."""
    dtypes: dict[str, np.dtype[Any]]

    @classmethod
    def of(cls, path: Path, names: Sequence[str]) -> "_Part":
        with h5py.File(path, "r") as file:
            attributes: dict[str, Any] = dict(file.attrs)
            values = {name: _dataset(file, f"{name}/values") for name in names}
            return cls(
                samples=int(attributes["samples"]),
                tokens=int(attributes["tokens"]),
                trained_tokens=int(attributes["trained_tokens"]),
                sources=[(name, count) for name, count in json.loads(attributes["sources"])],
                totals={name: len(one) for name, one in values.items()},
                dtypes={name: one.dtype for name, one in values.items()},
            )


def join_h5(paths: Sequence[Path], out: Path, header: Header, inputs: str) -> None:
    """Write the samples of several files into one, those of one after those of another.

    Args:
        paths: files of `write_h5`, known to be whole.
        out: the file to write; an old one stays until the new one is on the disk.
        header: what all of them were made with.
        inputs: a digest of what they were made from, see `prepare`.
    """
    names = column_names(header.stage)
    parts = [_Part.of(path, names) for path in paths]
    samples = sum(part.samples for part in parts)
    every = groupby((one for part in parts for one in part.sources), lambda source: source[0])
    sources = [(name, sum(count for _, count in group)) for name, group in every]
    with whole_file(out) as file:
        file.attrs.update(asdict(header))
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["samples"] = samples
        file.attrs["tokens"] = sum(part.tokens for part in parts)
        file.attrs["trained_tokens"] = sum(part.trained_tokens for part in parts)
        file.attrs["sources"] = json.dumps(sources, ensure_ascii=False)
        file.attrs["inputs"] = inputs
        lines = file.create_dataset("origin/lines", shape=(samples,), dtype=np.int64)
        columns = [_Column(file, name, samples, parts) for name in names]
        first, cuts = 0, list[int]()
        for path, part in zip(paths, parts, strict=True):
            with h5py.File(path, "r") as source:
                lines[first : first + part.samples] = _dataset(source, "origin/lines")[...]
                cuts += [first + cut for cut in read_cuts(source)]
                for column in columns:
                    column.take(source, first)
            first += part.samples
        for column in columns:
            column.close()
        write_cuts(file, cuts)


class _Column:
    """One column of the file that is written."""

    def __init__(self, file: h5py.File, name: str, samples: int, parts: Sequence[_Part]) -> None:
        self._name = name
        self._group = file.create_group(name)
        dtype = np.result_type(*(part.dtypes[name] for part in parts))
        total = sum(part.totals[name] for part in parts)
        self._values = self._group.create_dataset("values", shape=(total,), dtype=dtype)
        self._offsets = self._group.create_dataset("offsets", shape=(samples + 1,), dtype=np.int64)
        self._taken = 0
        self._checksum = 0

    def take(self, source: h5py.File, first: int) -> None:
        """Copy what a file has, whose first sample is number `first` here."""
        offsets = _dataset(source, f"{self._name}/offsets")[...]
        self._offsets[first : first + len(offsets)] = offsets + self._taken
        for piece in _pieces(_dataset(source, f"{self._name}/values")):
            stored = piece.astype(self._values.dtype)
            self._values[self._taken : self._taken + len(stored)] = stored
            self._checksum = zlib.crc32(stored.data, self._checksum)
            self._taken += len(stored)

    def close(self) -> None:
        """Write the checksum, which is of the values and then of the offsets."""
        for piece in _pieces(self._offsets):
            self._checksum = zlib.crc32(piece.data, self._checksum)
        self._group.attrs["crc32"] = self._checksum


def _pieces(values: h5py.Dataset) -> Iterator[np.ndarray[Any, Any]]:
    for start in range(0, len(values), _PIECE):
        yield values[start : start + _PIECE]


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    found = file[name]
    assert isinstance(found, h5py.Dataset)
    return found
