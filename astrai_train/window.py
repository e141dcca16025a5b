"""What the micro-batches of one optimizer step add up to on a rank, and whom to blame for it.

Everything is kept on the device: nothing waits for it before the optimizer step.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from lightning import Trainer
from torch import Tensor

from astrai_train.metrics import Sums

T = TypeVar("T")


class NonFiniteError(ValueError):
    """The loss or the gradient of an optimizer step is infinite or NaN."""

    def __init__(self, step: int, blame: str) -> None:
        super().__init__(
            f"optimizer step {step} has a loss or gradient that is infinite or NaN ({blame}). The "
            f"{step} steps before it are saved; look at that data, lower model.optimizer.lr, or "
            "leave such steps out with --model.init_args.on_nonfinite skip"
        )
        self.step = step


class Window:
    """The micro-batches of an optimizer step, so far as they are done."""

    def __init__(self) -> None:
        self.loss = torch.zeros((), dtype=torch.float64)
        """Sum of the losses."""
        self.count = torch.zeros((), dtype=torch.float64)
        """What the gradients are divided by."""
        self.sums = Sums()
        """What is recorded of them."""
        self._losses: list[Tensor] = []
        self._items: list[Tensor | None] = []

    def add(self, total: Tensor, count: Tensor, items: Tensor | None) -> None:
        """Add a micro-batch.

        Args:
            total: sum of its losses.
            count: how many were summed.
            items: numbers of its items in the data set (B,), where they are known.
        """
        total = total.detach().double()
        self.loss = self.loss.to(total.device) + total
        self.count = self.count.to(total.device) + count.to(total.device)
        self.sums.add("loss", total, count)
        self._losses.append(total)
        self._items.append(items)

    def blame(self, rank: int, dataset: Any = None) -> str:
        """Say which data was not finite on this rank.

        Args:
            rank: this one.
            dataset: tells by `place` where an item comes from.
        """
        bad = [number for number, loss in enumerate(self._losses) if not loss.isfinite()]
        what = "loss" if bad else "gradient, all losses are finite"
        suspects = bad or range(len(self._losses))
        places = [_places(self._items[number], dataset) for number in suspects]
        return f"rank {rank}: {what}, of {', '.join(places)}"


def over_ranks(value: T) -> list[T]:
    """Gather a small Python value from all ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def of_rank(states: Sequence[T], trainer: Trainer) -> list[T]:
    """Return what this rank goes on from, of what `over_ranks` gathered when it was saved.

    It is its own; with another number of ranks the first takes all, and the others nothing.
    """
    if len(states) == trainer.world_size:
        return [states[trainer.global_rank]]
    return list(states) if trainer.is_global_zero else []


def _places(items: Tensor | None, dataset: Any) -> str:
    numbers: Sequence[int] = [] if items is None else [n for n in items.tolist() if n >= 0]
    if not numbers:
        return "a batch of unknown items" if items is None else "a batch without items"
    if not hasattr(dataset, "place"):
        return "items " + ", ".join(map(str, numbers))
    return ", ".join(dataset.place(number) for number in numbers)
