"""Batches whose place in the data can be saved and entered again.

What a reader would get wrong: it counts batches when they are handed to training, not when a
worker fetches them, so prefetching changes nothing. And an iterator does nothing before its first
batch is asked for, because Lightning makes more of them than it reads.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from astrai_train.data.datasets import NumberedDataset
from astrai_train.data.sampler import ResumableDistributedSampler


class ResumableLoader:
    """Yields the data set's batches, of B items each; the last one is filled up with None.

    Beside what the data set puts into it, a batch has the numbers of its `items`, (B,) int64, and
    -1 for None.

    Each iteration is an epoch: it goes on where `load_state_dict` put it, or begins the next one.
    It is no `DataLoader`, so that Lightning leaves its sampler and its epochs alone.

    Args:
        dataset: rows, pairs or prompts.
        sampler: which of them, in what order.
        batch_size: items of a batch, B.
        num_workers: processes that build batches; 0 builds them in this one.
        repeats: how often each batch is handed out, one time after the other.
    """

    def __init__(
        self,
        dataset: NumberedDataset,
        sampler: ResumableDistributedSampler,
        batch_size: int,
        num_workers: int = 0,
        repeats: int = 1,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.repeats = repeats
        self._handed_out = 0  # times that the batch at the order's place was
        self._order = sampler
        self._resumed = False
        self._iterator: object | None = None
        """Lightning stops the workers of what bears this name and sets it to None."""

    def __len__(self) -> int:
        """Batches of a whole epoch, on each rank."""
        return -(-len(self._order) // self.batch_size) * self.repeats

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = self._order
        finished = order.consumed >= order.num_rows
        if (order.consumed or self._handed_out) and (finished or not self._resumed):
            order.set_epoch(order.epoch + 1)
            self._handed_out = 0
        self._resumed = False
        if self._iterator is None:
            self._loader = self._make_loader()
        self._iterator = iterator = iter(self._loader)
        for batch in iterator:
            while self._handed_out < self.repeats - 1:
                self._handed_out += 1
                yield batch
            self._handed_out = 0
            order.advance(self.batch_size * order.world_size)
            yield batch

    def _make_loader(self) -> DataLoader[Any]:
        return DataLoader(
            _Numbered(self.dataset),
            batch_sampler=_FullBatches(self._order, self.batch_size),
            collate_fn=partial(_collate, self.dataset),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # its own: seeding workers from the global one would disturb what training draws
            generator=torch.Generator(),
        )

    def state_dict(self) -> dict[str, int]:
        """The place after the last batch that was handed out; the same on every rank."""
        state = self._order.state_dict()
        return state | {"handed_out": self._handed_out} if self._handed_out else state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on from a saved place.

        Raises:
            ValueError: the place is one of other data.
        """
        self._order.load_state_dict(state)
        self._handed_out = state.get("handed_out", 0)
        # a checkpoint says so where the trainer ends its epochs before the data ends
        self._resumed = not state.get("ended", False)


class _Numbered(Dataset[tuple[int | None, Any]]):
    """Items with their numbers."""

    def __init__(self, dataset: NumberedDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, number: int | None) -> tuple[int | None, Any]:
        return number, self._dataset[number]


def _collate(dataset: NumberedDataset, items: list[tuple[int | None, Any]]) -> dict[str, Any]:
    batch = dataset.collate([item for _, item in items])
    numbers = [-1 if number is None else number for number, _ in items]
    return batch | {"items": torch.tensor(numbers, dtype=torch.int64)}


class _FullBatches:
    """The sampler's rows in lists of one length."""

    def __init__(self, sampler: ResumableDistributedSampler, batch_size: int) -> None:
        self._sampler = sampler
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._sampler) // self._batch_size)

    def __iter__(self) -> Iterator[list[int | None]]:
        batch: list[int | None] = []
        for row in self._sampler:
            batch.append(row)
            if len(batch) == self._batch_size:
                yield batch
                batch = []
        if batch:
            yield batch + [None] * (self._batch_size - len(batch))
