"""Stops a real training process at a named moment, so that its parent can kill it there.

The environment says when, so that the configuration stays that of a run never interrupted:
INTERRUPT="MOMENT:STEP" stops it, SLOW=SECONDS lets each batch take so long. The process says
`reached MOMENT` and stops itself; what then comes from outside is a signal as any other.

What it trains on is in the run's `seen.txt`: the step and the numbers of the rows.
"""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Interruption(Callback):
    """Stops its own process."""

    def __init__(self) -> None:
        moment, _, step = os.environ.get("INTERRUPT", ":0").partition(":")
        self.moment, self.step = moment, int(step)
        self.pause = float(os.environ.get("SLOW", "0"))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look into rollouts from here on."""
        if self.moment != "rollout":
            return
        before = pl_module.between_engine_steps

        def between_engine_steps() -> None:
            self._stop_if("rollout", trainer)
            if callable(before):
                before()

        pl_module.between_engine_steps = between_engine_steps  # pyright: ignore

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.pause >= 1:
            trainer.print("pausing")
        time.sleep(self.pause)
        rows = ",".join(map(str, batch["items"].tolist()))
        with (Path(trainer.default_root_dir) / "seen.txt").open("a") as file:
            file.write(f"{trainer.global_step} {rows}\n")
        self._stop_if("batch", trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        # an epoch's last batch ends its window, however many batches that has
        if done % trainer.accumulate_grad_batches and done < trainer.num_training_batches:
            self._stop_if("window", trainer)

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
        self._stop_if("validation", trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if("epoch", trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.moment == "checkpoint" and trainer.global_step >= self.step:
            self.moment = "none"
            root = Path(trainer.default_root_dir) / "checkpoints"
            threading.Thread(target=_stop_while_writing, args=(root,), daemon=True).start()

    def _stop_if(self, moment: str, trainer: Trainer) -> None:
        if moment == self.moment and trainer.global_step >= self.step:
            self.moment = "none"
            _stop(moment)


def _stop(moment: str) -> None:
    os.write(1, f"reached {moment}\n".encode())
    os.kill(os.getpid(), signal.SIGSTOP)


def _stop_while_writing(root: Path) -> None:
    while not any(root.glob(".tmp-*/*")):
        pass
    _stop("checkpoint")
