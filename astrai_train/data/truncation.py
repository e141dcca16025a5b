"""What a window is too short for, told before training refuses or drops it.

In stage seq documents are laid end to end and rows cut them: no token is lost, but what a row
begins with is read without what came before. In the other stages samples stay whole: a record with
a sample that is longer than the window is refused, or dropped whole where `too_long` is drop.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from astrai_train.data.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """The records of a storage that a window is too short for."""

    window: int
    records: NDArray[np.int64]
    """Numbers of the records, of which a part is cut off or which are dropped."""
    samples: NDArray[np.int64]
    """Numbers of their samples."""
    tokens: int
    """Tokens that training does not see: none of a stream."""
    trained_tokens: int
    """How many of them would be taught."""

    @classmethod
    def of(cls, storage: Storage, window: int) -> "Truncation":
        """Find out what rows of `window` tokens do to a storage."""
        offsets, starts = storage.input_ids.offsets, storage.record_starts
        if storage.stage == "seq":
            ends = offsets[1:] - 1
            cut = np.flatnonzero(offsets[:-1] // window != ends // window)
            return cls(window=window, records=cut, samples=cut, tokens=0, trained_tokens=0)
        lengths = storage.input_ids.lengths
        longest = np.maximum.reduceat(lengths, starts)
        counts = np.diff(np.append(starts, len(storage)))
        records = np.flatnonzero(longest > window)
        samples = np.flatnonzero(np.repeat(longest > window, counts))
        return cls(
            window=window,
            records=records,
            samples=samples,
            tokens=int(lengths[samples].sum()),
            trained_tokens=sum(int(storage.trained[int(one)].sum()) for one in samples),
        )

    def describe(self, storage: Storage) -> str:
        """Say it in a line."""
        count, what = storage.content.split()
        some = f"{len(self.records):,} of {count} {what}"
        if storage.stage == "seq":
            return f"{some} go on in another row; no token is lost"
        if not len(self.records):
            return f"none of {count} {what}"
        share = self.tokens / max(storage.num_tokens, 1)
        return (
            f"{some} have more than {self.window:,} tokens: refused, or with too_long: drop "
            f"{self.tokens:,} tokens lost ({share:.1%}), {self.trained_tokens:,} of them trained"
        )
