"""What the reference thinks of each pair, kept beside the data.

DPO compares the policy with the model it started from. That model's log-probabilities are numbers
that never change, two a pair: they are computed once and kept in a file, so that no second model is
in memory while training. The file's name is a digest of all they depend on; where one of these
changes, another file is made and the message says what changed.

What a reader would get wrong: NaN stands for a pair that is not computed yet. A file with some of
them is what an interrupted computation left, and it goes on from there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_FORMAT = "1"
_NAME = "logprobs"


class ReferenceFile:
    """Log-probabilities of all pairs of a file of data.

    Args:
        data: the file that holds the pairs.
        key: what they depend on, each by its hash.
        num_pairs: how many pairs there are.

    Raises:
        ValueError: a file of this name is there, but damaged.
    """

    def __init__(self, data: Path, key: Mapping[str, str], num_pairs: int) -> None:
        self.key = dict(key)
        self._data = data
        content = json.dumps([_FORMAT, num_pairs, self.key], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.path = data.with_name(f"{data.name}.reference-{digest}.safetensors")
        self.values: NDArray[np.float32] = np.full((num_pairs, 2), np.nan, dtype=np.float32)
        """(pairs, 2), chosen and rejected; NaN where not computed yet."""
        self.read()

    def read(self) -> None:
        """Take what is on the disk."""
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, "numpy") as file:
                values = file.get_tensor(_NAME)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path} is damaged ({' '.join(str(error).split())}): delete it"
            ) from None
        if values.shape != self.values.shape or values.dtype != np.float32:
            raise ValueError(f"{self.path} is damaged (its shape is {values.shape}): delete it")
        self.values = values

    def write(self) -> None:
        """Put it on the disk, whole or not at all."""
        temporary = self.path.with_name(f".{self.path.name}.tmp-{os.getpid()}")
        try:
            save_file({_NAME: self.values}, temporary, metadata={"format": _FORMAT} | self.key)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def missing(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of some pairs are not computed yet."""
        return pairs[np.isnan(self.values[pairs]).any(axis=1)]

    def changes(self) -> list[str]:
        """What differs from the newest file that the same data has from before."""
        others = [
            path
            for path in self._data.parent.glob(f"{self._data.name}.reference-*.safetensors")
            if path != self.path
        ]
        if not others:
            return []
        newest = max(others, key=lambda path: path.stat().st_mtime_ns)
        try:
            with safe_open(newest, "numpy") as file:
                before = file.metadata() or {}
        except (SafetensorError, OSError):
            return []
        return [name for name, value in self.key.items() if before.get(name) != value]
