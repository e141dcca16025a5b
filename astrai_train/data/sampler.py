"""Which rows a rank sees and when: a pure function of (seed, epoch), entered at any place.

The state is (epoch, rows consumed by all ranks together). It says nothing of ranks or batches, so
a run can go on with another number of either and still see each row of the epoch once.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


class ResumableDistributedSampler(Sampler[int | None]):
    """Yields this rank's share of the rows that are left of the epoch.

    Ranks take turns, so that `n` rows a rank are the next `n * world_size` of the order. Where the
    rows run out before every rank had its turn, the others get None: a row of padding.

    Args:
        num_rows: rows of the data set.
        seed: of the order.
        shuffle: whether there is an order other than the rows' own.
        rank: whose share to yield.
        world_size: number of ranks.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.consumed = 0

    def __len__(self) -> int:
        """Rows of this rank in a whole epoch, padding among them; the same for each rank."""
        return -(-self.num_rows // self.world_size)

    def __iter__(self) -> Iterator[int | None]:
        order = self.order(self.epoch)
        for place in range(self.consumed, self.num_rows, self.world_size):
            mine = place + self.rank
            yield int(order[mine]) if mine < self.num_rows else None

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The rows in the order of an epoch.

        Rows are sorted by a hash of (seed, epoch, row), which no library's next version changes.
        """
        rows = np.arange(self.num_rows, dtype=np.int64)
        if not self.shuffle:
            return rows
        start = _mix(_mix(np.array([self.seed % 2**64], dtype=np.uint64)) + np.uint64(epoch))
        return np.argsort(_mix(rows.astype(np.uint64) + start), kind="stable")

    def set_epoch(self, epoch: int) -> None:
        """Stand at the beginning of an epoch."""
        self.epoch = epoch
        self.consumed = 0

    def advance(self, rows: int) -> None:
        """Count rows, of all ranks, that training has consumed."""
        self.consumed = min(self.consumed + rows, self.num_rows)

    def state_dict(self) -> dict[str, int]:
        """Where the order is and stands; equal on every rank."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "num_rows": self.num_rows,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Stand where a saved run stood.

        Raises:
            ValueError: the data or the seed is another, so no place of this order is that one.
        """
        for key, here in (("num_rows", self.num_rows), ("seed", self.seed)):
            if state[key] != here:
                what = "rows" if key == "num_rows" else "as the data seed"
                raise ValueError(
                    f"the checkpoint was made with {state[key]} {what}, now it is {here}: "
                    "resume with the data and settings of that run, or start a new run"
                )
        self.epoch = state["epoch"]
        self.consumed = state["consumed"]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection on 64 bits that looks random (the finaliser of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
