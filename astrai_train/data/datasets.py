"""Rows of one window, by number: row n is the same in every epoch, process and run.

A row is a dict of int64 tensors of shape (T,), see `packing` for what they mean. Stages dpo and
grpo number pairs and prompts instead: see `pairs` and `prompts`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from astrai_train.data.packing import (
    IGNORED,
    Row,
    empty_row,
    num_stream_rows,
    pack_samples,
    samples_row,
    stream_row,
)
from astrai_train.data.ragged import Offsets
from astrai_train.data.storage import Storage

_log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
TooLong = Literal["refuse", "drop"]


class NumberedDataset(Dataset[Any], ABC):
    """What a loader reads: items by number, None where a rank has none left, and their batches."""

    @abstractmethod
    def __len__(self) -> int:
        """How many items there are."""

    @abstractmethod
    def __getitem__(self, number: int | None) -> Any:
        """One item."""

    @abstractmethod
    def collate(self, items: list[Any]) -> dict[str, Any]:
        """The batch of some items."""

    @abstractmethod
    def place(self, number: int) -> str:
        """Where an item comes from: file and line."""


class _RowDataset(NumberedDataset):
    """Rows of a window; number None is a row of padding.

    Args:
        storage: the samples.
        window_size: positions of a row, T.
        padding_id: the token in positions that hold none.
    """

    def __init__(self, storage: Storage, window_size: int, padding_id: int) -> None:
        if window_size < 2:
            raise ValueError(f"window_size must be at least 2, not {window_size}")
        self.storage = storage
        self.window_size = window_size
        self.padding_id = padding_id

    @abstractmethod
    def row(self, number: int) -> Row:
        """The arrays of a row."""

    @abstractmethod
    def samples(self, number: int) -> Sequence[int]:
        """Which samples a row holds, or parts of which."""

    def place(self, number: int) -> str:
        """Where a row's first and last samples come from."""
        samples = self.samples(number)
        first, last = (self.storage.place(sample) for sample in (samples[0], samples[-1]))
        return f"row {number}: {first}" + (f" to {last}" if len(samples) > 1 else "")

    def collate(self, items: list[Tensors]) -> Tensors:
        """Stack rows to (B, T)."""
        return default_collate(items)

    def __getitem__(self, number: int | None) -> Tensors:
        if number is None:
            row = empty_row(self.window_size, self.padding_id)
        elif 0 <= number < len(self):
            row = self.row(number)
        else:
            raise IndexError(f"row {number} of {len(self)}")
        return {name: torch.from_numpy(values) for name, values in row.items()}


class SEQDataset(_RowDataset):
    """Documents as one stream, cut into rows: nothing is left out and only the end is padded.

    Args:
        storage: the documents.
        window_size: positions of a row, T.
        padding_id: the token in positions that hold none.
        stride: tokens from the start of a row to that of the next; None is the window.
        counts_once: where rows overlap, what an earlier row has as a label is context alone.
    """

    def __init__(
        self,
        storage: Storage,
        window_size: int,
        padding_id: int,
        stride: int | None = None,
        counts_once: bool = False,
    ) -> None:
        super().__init__(storage, window_size, padding_id)
        assert storage.stage == "seq"
        self._stride = stride or window_size
        self._counts_once = counts_once

    def __len__(self) -> int:
        return num_stream_rows(self.storage.input_ids, self.window_size, self._stride)

    def samples(self, number: int) -> Sequence[int]:
        """The documents that a row has a part of."""
        stream = self.storage.input_ids
        start = number * self._stride
        ends = np.array([start, min(start + self.window_size, stream.total) - 1])
        first, last = np.searchsorted(stream.offsets, ends, side="right") - 1
        return range(int(first), int(last) + 1)

    def row(self, number: int) -> Row:
        """The arrays of a row."""
        stream, window = self.storage.input_ids, self.window_size
        row = stream_row(stream, number, window, self.padding_id, self._stride)
        if self._counts_once and number:
            row["labels"][: window - self._stride] = IGNORED
        return row


class SFTDataset(_RowDataset):
    """Conversations packed into rows without cutting one.

    Args:
        storage: the samples.
        window_size: positions of a row, T.
        padding_id: the token in positions that hold none.
        too_long: what to do with a sample that no row can hold.

    Raises:
        ValueError: a sample is longer than the window and is to be refused; says file and line.
    """

    def __init__(
        self,
        storage: Storage,
        window_size: int,
        padding_id: int,
        too_long: TooLong = "refuse",
    ) -> None:
        super().__init__(storage, window_size, padding_id)
        assert storage.stage == "sft"
        lengths = storage.input_ids.lengths
        self._kept = fitting(storage, lengths, np.arange(len(lengths)), window_size, too_long)
        self.num_dropped = len(lengths) - len(self._kept)
        """Samples longer than the window."""
        self._packs = pack_samples(lengths[self._kept].tolist(), window_size)

    def __len__(self) -> int:
        return len(self._packs)

    def samples(self, number: int) -> Sequence[int]:
        """Which samples a row holds."""
        return [int(self._kept[one]) for one in self._packs[number].tolist()]

    def row(self, number: int) -> Row:
        """The arrays of a row."""
        storage = self.storage
        return samples_row(
            storage.input_ids,
            storage.trained,
            self.samples(number),
            self.window_size,
            self.padding_id,
        )


def fitting(
    storage: Storage,
    lengths: Offsets,
    samples: Offsets,
    window_size: int,
    too_long: TooLong,
) -> Offsets:
    """Which samples, or groups of them, no window is too short for.

    Args:
        storage: the samples.
        lengths: tokens of each group's longest sample.
        samples: the first sample of each group, to say where it stands.
        window_size: the most tokens of a sample.
        too_long: what to do with longer ones.

    Raises:
        ValueError: one is longer and is to be refused, or all are; says file and line.
    """
    kept = np.flatnonzero(lengths <= window_size)
    if len(kept) == len(lengths):
        return kept
    first = int(np.argmax(lengths > window_size))
    place = storage.place(int(samples[first]))
    example = f"{place} has {lengths[first]} tokens"
    if not len(kept):
        raise ValueError(
            f"every sample is longer than window_size {window_size} ({example}): raise window_size"
        )
    num_dropped = len(lengths) - len(kept)
    if too_long == "refuse":
        raise ValueError(
            f"{example}, more than window_size {window_size} ({num_dropped} of {len(lengths)} "
            f"samples are too long, the longest has {lengths.max()}): raise window_size, or "
            "leave them out with too_long: drop"
        )
    _log.warning(
        "%d of %d samples are longer than window_size %d and are left out; the first is %s",
        num_dropped,
        len(lengths),
        window_size,
        place,
    )
    return kept
