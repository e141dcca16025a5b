"""Several sources as one, each with its share."""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

Row = TypeVar("Row", covariant=True)


class Source(Protocol[Row]):
    """Rows by number."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int, /) -> Row:
        """The row of a number."""
        ...


class Mixture(Generic[Row]):
    """Rows of several sources, so that each source makes up its share of an epoch.

    An epoch goes once through the source that is largest for its share; the others repeat, each
    row as often as the next or once more. Nothing is drawn: which row is which is settled, and a
    sampler shuffles it like any other data.

    Args:
        sources: at least one, none of them empty.
        weights: the share of each, in any unit.

    Raises:
        ValueError: a weight is not above 0, or there are not as many as sources.
    """

    def __init__(self, sources: Sequence[Source[Row]], weights: Sequence[float]) -> None:
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
        """Rows of each source in an epoch."""
        self._starts = np.cumsum([0, *self.counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Row:
        source, row = self.locate(index)
        return self.sources[source][row]

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the source that a row belongs to, and of the row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return source, (index - int(self._starts[source])) % len(self.sources[source])
