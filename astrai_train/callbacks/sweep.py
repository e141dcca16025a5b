"""A sweep over learning rates, from too low to too high."""

import math
from collections.abc import Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

_SMOOTHING = 0.8
"""Of the running mean of the losses."""
_LEAVES = 4.0
"""The sweep ends when the smoothed loss is so many times the lowest one."""


class Sweep(Callback):
    """Raises the learning rate from step to step and keeps what the loss does.

    Args:
        steps: optimizer steps from the lowest rate to the highest.
        lowest: first rate, as a multiple of the configured one.
        highest: last rate, as a multiple of the configured one.
    """

    def __init__(self, steps: int, lowest: float, highest: float) -> None:
        self.steps, self.lowest, self.highest = steps, lowest, highest
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._configured: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of the configured rates; no validation follows."""
        self._configured = [group["initial_lr"] for group in trainer.optimizers[0].param_groups]
        trainer.limit_val_batches = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the rate of the step that this batch belongs to."""
        self._note(trainer)
        step = trainer.global_step
        factor = self.lowest * (self.highest / self.lowest) ** (step / max(1, self.steps - 1))
        for group, rate in zip(trainer.optimizers[0].param_groups, self._configured, strict=True):
            group["lr"] = rate * factor
        if len(self.rates) == step:
            self.rates.append(self._configured[0] * factor)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last loss."""
        self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        # the module logs a step's loss after this callback has seen its batch, so one later
        if len(self.losses) == trainer.global_step:
            return
        loss = float(trainer.callback_metrics["train/loss"])
        self.losses.append(loss)
        lowest = min(smoothed(self.losses))
        if not math.isfinite(loss) or smoothed(self.losses)[-1] > _LEAVES * lowest:
            trainer.should_stop = True


def smoothed(losses: Sequence[float]) -> list[float]:
    """Running mean of the losses, without the bias of its start."""
    mean, means = 0.0, []
    for index, loss in enumerate(losses, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        means.append(mean / (1 - _SMOOTHING**index))
    return means
