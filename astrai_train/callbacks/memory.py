"""What the allocator keeps without need goes back to the system."""

from collections.abc import Callable
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from astrai_core.model.allocator import resident_memory, return_free_memory

_EVERY = 32  # batches between two looks
_GROWTH = 1.25
_LEAST = 256 * 1024 * 1024  # bytes of growth that are worth the steps' taking them anew


class FreeMemory(Callback):
    """Returns the holes of the heap soon after the start, and when the process grew by a quarter.

    Batches differ in size, and so do the blocks that their steps take: between those that stay,
    the heap grows holes that fit none of the next. In a run of 2,400 steps they were half of the
    memory. What a step needs is got back at the next step, so the look is rare and the measure is
    what the process has again after it.

    Args:
        resident: bytes of memory that the process has; None where the system does not tell.
        give_back: returns what is free.
    """

    def __init__(
        self,
        resident: Callable[[], int | None] = resident_memory,
        give_back: Callable[[], object] = return_free_memory,
    ) -> None:
        self._resident, self._give_back = resident, give_back
        self._batches = 0
        self._needed: int | None = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look how much there is."""
        del trainer, pl_module, outputs, batch, batch_idx
        self._batches += 1
        if self._batches % _EVERY:
            return
        if (now := self._resident()) is None:
            return
        has_grown = self._needed is not None and now > max(
            _GROWTH * self._needed, self._needed + _LEAST
        )
        if has_grown or self._batches == _EVERY:  # compiling and the first steps leave the most
            self._give_back()
            self._needed = None
        elif self._needed is None:
            self._needed = now
