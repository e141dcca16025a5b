"""Pairs of answers as batches without padding: stage dpo.

P pairs, R rows of T positions. A batch is one dict of tensors:

    input_ids, labels, position_ids    (R, T) as for every stage, see `packing`
    document_ids                       (R, T) 2p is the chosen side of pair p, 2p + 1 the rejected
    pairs                              (P,) number of each pair in the data
    reference                          (P, 2) log-probabilities of both sides under the reference,
                                       once they are known
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from astrai_train.data.datasets import NumberedDataset, TooLong, fitting
from astrai_train.data.packing import batch_rows
from astrai_train.data.ragged import Array
from astrai_train.data.storage import Storage


@dataclass(frozen=True, kw_only=True)
class PairItem:
    """One pair: ids and which of them are taught, chosen side first."""

    number: int
    sides: tuple[tuple[Array, Array], tuple[Array, Array]]
    reference: NDArray[np.float32] | None
    """Log-probabilities of both sides (2,) under the reference."""


class DPODataset(NumberedDataset):
    """Pairs by number; both sides of a pair are always in one batch.

    Args:
        storage: the samples, two a pair.
        window_size: the most tokens of a side, prompt included.
        padding_id: the token in positions that hold none.
        too_long: what to do with a pair that has a longer side.

    Raises:
        ValueError: a pair is too long and is to be refused; says file and line.
    """

    def __init__(
        self, storage: Storage, window_size: int, padding_id: int, too_long: TooLong = "refuse"
    ) -> None:
        assert storage.stage == "dpo"
        self.storage = storage
        self.padding_id = padding_id
        self.reference: NDArray[np.float32] | None = None
        """Log-probabilities (all pairs of the storage, 2) of the model that training starts with;
        set before batches are made."""
        longest = storage.input_ids.lengths.reshape(-1, 2).max(axis=1)
        self.pairs = fitting(storage, longest, storage.record_starts, window_size, too_long)
        """The pairs that are no longer than the window."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int | None) -> PairItem | None:
        if number is None:
            return None
        pair = int(self.pairs[number])
        ids, trained = self.storage.input_ids, self.storage.trained
        chosen, rejected = 2 * pair, 2 * pair + 1
        return PairItem(
            number=pair,
            sides=((ids[chosen], trained[chosen]), (ids[rejected], trained[rejected])),
            reference=None if self.reference is None else self.reference[pair],
        )

    def place(self, number: int) -> str:
        """Where a pair came from: file and line."""
        return self.storage.place(2 * int(self.pairs[number]))

    def collate(self, items: list[PairItem | None]) -> dict[str, Tensor]:
        """Pack the sides of some pairs into rows; None is left out."""
        pairs = [item for item in items if item is not None]
        rows = batch_rows([side for pair in pairs for side in pair.sides], self.padding_id)
        batch = {name: torch.from_numpy(values) for name, values in rows.items()}
        batch["pairs"] = torch.tensor([pair.number for pair in pairs], dtype=torch.int64)
        known = [pair.reference for pair in pairs if pair.reference is not None]
        if len(known) == len(pairs):
            values = np.array(known, dtype=np.float32).reshape(-1, 2)
            batch["reference"] = torch.from_numpy(values)
        return batch
