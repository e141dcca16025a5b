"""SIGTERM and Ctrl-C save the run at its next optimizer step and end it.

A handler only sets a flag, which the training thread reads where a checkpoint is possible.
Lightning's own handler raises wherever a batch happens to end, and exits with 0 or 1.
"""

import math
import os
import signal
import time
from functools import partial
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from astrai_train.callbacks.checkpoint import FolderCheckpoint
from astrai_train.modules.grpo import GRPOModule

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedBySignalError(Exception):
    """The run was saved and ended, as a signal asked."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.number = number
        self.step = step

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that this signal ended."""
        return 128 + self.number


class TimeIsUpError(Exception):
    """The run was saved and ended, because it had no more time."""

    def __init__(self, step: int) -> None:
        super().__init__(f"trainer.max_time is over after step {step}")


class Preemption(Callback):
    """End the run at its next optimizer step after a signal; a second signal ends it at once.

    It does the same when the time is up. Lightning's timer ends a run within an accumulation
    window, whose micro-batches are lost, and counts what earlier runs of a folder took.

    Args:
        checkpoint: saves the run.
        max_time: seconds of training before it ends; None sets no bound.
    """

    def __init__(self, checkpoint: FolderCheckpoint, max_time: float | None = None) -> None:
        self._checkpoint = checkpoint
        self._max_time = max_time
        self._ends_at = math.inf
        self._is_time_up = False
        self._received: int | None = None
        self._is_agreed = False
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    @property
    def received(self) -> int | None:
        """Number of the signal that asked to stop."""
        return self._received

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over, from Lightning too."""
        self._process = os.getpid()
        if self._max_time is not None:
            self._ends_at = time.monotonic() + self._max_time
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        if trainer.received_sigterm:
            # it came since `fit` began; Lightning would end after the first batch, with status 0
            self._received = int(signal.SIGTERM)
            trainer._signal_connector.received_sigterm = False  # pyright: ignore[reportPrivateUsage]
        # a rollout is long; but ranks can only stop together, which is between steps
        if isinstance(pl_module, GRPOModule) and trainer.world_size == 1:
            pl_module.between_engine_steps = partial(self._stop, trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let ranks agree, so that all save the same step."""
        self._is_time_up = time.monotonic() >= self._ends_at
        if trainer.world_size > 1 and self._max_time is not None:
            strategy = trainer.strategy
            self._is_time_up = strategy.reduce_boolean_decision(self._is_time_up, all=False)
        self._agree(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop before a step; the last one has been logged by now."""
        self._stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before a validation, which the continued run begins with."""
        self._stop(trainer)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop within a validation, which the continued run repeats."""
        if trainer.state.fn == "fit":
            self._agree(trainer)
        self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between epochs."""
        self._stop(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._restore()

    def _agree(self, trainer: Trainer) -> None:
        """Learn of a signal to any rank; one that acts alone would leave the others waiting."""
        if trainer.world_size == 1:
            return
        mine = self._received is not None
        self._is_agreed = trainer.strategy.reduce_boolean_decision(mine, all=False)
        if self._is_agreed and not mine:
            self._received = int(signal.SIGTERM)

    def _stop(self, trainer: Trainer) -> None:
        is_asked = self._received is not None and (trainer.world_size == 1 or self._is_agreed)
        if trainer.sanity_checking or not (is_asked or self._is_time_up):
            return
        if self._checkpoint.is_between_steps:
            self._checkpoint.save(trainer)
            if not is_asked or self._received is None:
                raise TimeIsUpError(trainer.global_step)
            raise StoppedBySignalError(self._received, trainer.global_step)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader's worker, which ends with its parent
        if self._received is None:
            self._received = number
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
