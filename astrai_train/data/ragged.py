"""Many sequences of different lengths as flat arrays and offsets.

The flat arrays may be views of files: nothing here copies more than it is asked for.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.integer | np.bool_]
Offsets = NDArray[np.int64]


class Ragged:
    """Sequence n is `offsets[n]` to `offsets[n + 1]` of its segments laid end to end.

    Args:
        segments: one flat array, or several that are read as one.
        offsets: where sequences begin, and after the last where it ends.

    Raises:
        ValueError: the offsets do not lead from the first value to the last.
    """

    def __init__(self, segments: Sequence[Array], offsets: Offsets) -> None:
        self._segments = [segment for segment in segments if len(segment)]
        self._bounds = list(accumulate(map(len, self._segments), initial=0))
        self.offsets = offsets
        total = self._bounds[-1]
        if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != total:
            raise ValueError(f"the offsets do not lead from 0 to {total}")
        if np.any(offsets[1:] < offsets[:-1]):
            raise ValueError("the offsets go backwards")

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]], dtype: type[np.integer | np.bool_]) -> "Ragged":
        """Lay sequences end to end."""
        arrays = [np.asarray(sequence, dtype=dtype) for sequence in sequences]
        flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)
        return cls([flat], np.cumsum([0, *map(len, arrays)], dtype=np.int64))

    @classmethod
    def join(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """Several of them as one, without copying values."""
        offsets = [np.zeros(1, dtype=np.int64)]
        base = 0
        for part in parts:
            offsets.append(part.offsets[1:] + base)
            base += part.total
        segments = [segment for part in parts for segment in part.segments]
        return cls(segments, np.concatenate(offsets))

    @property
    def segments(self) -> Sequence[Array]:
        """The flat arrays."""
        return self._segments

    @property
    def total(self) -> int:
        """Number of values in all sequences."""
        return self._bounds[-1]

    @property
    def lengths(self) -> Offsets:
        """Number of values in each sequence."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Array:
        return self.flat(int(self.offsets[index]), int(self.offsets[index + 1]))

    def flat(self, start: int, stop: int) -> Array:
        """The values from `start` to `stop`, over the edges of sequences."""
        pieces: list[Array] = []
        segment = bisect_right(self._bounds, start) - 1
        while start < stop:
            first, last = self._bounds[segment : segment + 2]
            pieces.append(self._segments[segment][start - first : stop - first])
            start, segment = last, segment + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
