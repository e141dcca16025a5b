"""Progress for people: a bar on a terminal, a line every so many steps anywhere else."""

import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from astrai_train.wording import duration

_VERSION = "v_num"
VALIDATION = "val/"


def progress(trainer_every_n_steps: int) -> ProgressBar:
    """Choose what suits the place that the output goes to."""
    return Bar() if sys.stdout.isatty() else Lines(every_n_steps=trainer_every_n_steps)


class Bar(RichProgressBar):
    """Rich's bar without the logger's version, which a run folder does not have."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what the bar shows."""
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop(_VERSION, None)
        return metrics


class Lines(ProgressBar):
    """One plain line every so many optimizer steps, and one after each validation.

    Args:
        every_n_steps: optimizer steps between two lines.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__()
        self._every_n_steps = max(1, every_n_steps)
        self._is_enabled = True
        self._started_at = time.monotonic()
        self._first_step = 0
        self._printed_step = -1

    @property
    def is_enabled(self) -> bool:
        """Whether lines are printed."""
        return self._is_enabled

    def disable(self) -> None:
        """Be quiet, as on every rank but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Print again."""
        self._is_enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started_at = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Print the steps done; their metrics are known by now."""
        step = trainer.global_step
        if step > self._first_step and step % self._every_n_steps == 0:
            self._line(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the validation found."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._printed_step = -1
            self._line(trainer, pl_module, is_validation=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last step."""
        self._line(trainer, pl_module)

    def _line(
        self, trainer: Trainer, pl_module: LightningModule, is_validation: bool = False
    ) -> None:
        step = trainer.global_step
        if not self._is_enabled or step == self._printed_step:
            return
        self._printed_step = step
        parts = [f"step {step}{_of(total_steps(trainer))}"]
        for name, value in self.get_metrics(trainer, pl_module).items():
            # metrics stay with the trainer until they are logged anew
            if name != _VERSION and (is_validation or not name.startswith(VALIDATION)):
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
                parts.append(f"{name} {shown}")
        parts.append(self._remaining(trainer))
        sys.stdout.write("  ".join(filter(None, parts)) + "\n")
        sys.stdout.flush()

    def _remaining(self, trainer: Trainer) -> str:
        total, done = total_steps(trainer), trainer.global_step - self._first_step
        if total is None or done == 0 or total <= trainer.global_step:
            return ""
        pace = (time.monotonic() - self._started_at) / done
        return f"{duration(pace * (total - trainer.global_step))} left"


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps that the whole run has, None where nothing limits them."""
    limits: list[int] = []
    if trainer.max_steps >= 0:
        limits.append(trainer.max_steps)
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and batches != float("inf"):
        limits.append(trainer.max_epochs * -(-int(batches) // trainer.accumulate_grad_batches))
    return min(limits) if limits else None


def _of(total: int | None) -> str:
    return "" if total is None else f" of {total}"
