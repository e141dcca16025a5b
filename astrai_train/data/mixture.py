"""Several sources as one, each with its share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from astrai_train.data.datasets import NumberedDataset


class Mixture(NumberedDataset):
    """Items of several sources, so that each source makes up its share of an epoch.

    An epoch goes once through the source that is largest for its share; the others repeat, each
    item as often as the next or once more. Nothing is drawn: which item is which is settled, and a
    sampler shuffles it like any other data.

    Args:
        sources: at least one, none of them empty.
        weights: the share of each, in any unit.

    Raises:
        ValueError: a weight is not above 0, or there are not as many as sources.
    """

    def __init__(self, sources: Sequence[NumberedDataset], weights: Sequence[float]) -> None:
        if len(sources) != len(weights):
            raise ValueError(
                f"weights has {len(weights)} numbers for {len(sources)} sources; give one each"
            )
        for weight in weights:
            if not 0 < weight < float("inf"):
                raise ValueError(f"weights must be above 0, not {weight}")
        self.sources = list(sources)
        per_weight = max(len(source) / w for source, w in zip(sources, weights, strict=True))
        self.counts = [max(1, round(per_weight * weight)) for weight in weights]
        """Items of each source in an epoch."""
        self._starts = np.cumsum([0, *self.counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int | None) -> Any:
        if number is None:
            return self.sources[0][None]
        source, item = self.locate(number)
        return self.sources[source][item]

    def collate(self, items: list[Any]) -> dict[str, Any]:
        """The batch of some items; sources of one stage make the same batches."""
        return self.sources[0].collate(items)

    def place(self, number: int) -> str:
        """Where an item comes from."""
        source, item = self.locate(number)
        return self.sources[source].place(item)

    def locate(self, number: int) -> tuple[int, int]:
        """Number of the source that an item belongs to, and of the item in it."""
        if not 0 <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        return source, (number - int(self._starts[source])) % len(self.sources[source])
