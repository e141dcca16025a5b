"""Interrupts a real training process at a named moment, from inside, as no hook of ours would.

The environment says when, so that the configuration stays that of a run never interrupted:
INTERRUPT="MOMENT:STEP" kills it, SLOW=SECONDS lets each batch take so long.
"""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

MOMENTS = ("batch", "window", "validation", "epoch", "checkpoint")


class Interruption(Callback):
    """Sends SIGKILL to its own process."""

    def __init__(self) -> None:
        moment, _, step = os.environ.get("INTERRUPT", ":0").partition(":")
        self.moment, self.step = moment, int(step)
        self.pause = float(os.environ.get("SLOW", "0"))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.pause >= 1:
            trainer.print("pausing")
        time.sleep(self.pause)
        self._kill_if("batch", trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            self._kill_if("window", trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        time.sleep(self.pause)
        self._kill_if("validation", trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._kill_if("epoch", trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.moment == "checkpoint" and trainer.global_step >= self.step:
            root = Path(trainer.default_root_dir) / "checkpoints"
            threading.Thread(target=_kill_while_writing, args=(root,), daemon=True).start()

    def _kill_if(self, moment: str, trainer: Trainer) -> None:
        if moment == self.moment and trainer.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _kill_while_writing(root: Path) -> None:
    while not any(root.glob(".tmp-*/*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
