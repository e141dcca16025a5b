"""Progress for people: a bar on a terminal, a line every so many steps anywhere else.

Both tell of the whole run, in optimizer steps: an epoch or a micro-batch is nobody's question.
"""

import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from astrai_train.pace import Pace
from astrai_train.wording import duration, place

VALIDATION = "val/"
_VERSION = "v_num"
_SPEED = "train/tokens_per_s"
_REDRAWN_PER_SECOND = 2  # it takes time from the arithmetic


def progress(trainer_every_n_steps: int) -> ProgressBar:
    """Choose what suits the place that the output goes to."""
    return Bar() if sys.stdout.isatty() else Lines(every_n_steps=trainer_every_n_steps)


class RunProgress(ProgressBar):
    """What is known of a run while it trains; its heirs show it."""

    def __init__(self) -> None:
        super().__init__()
        self._is_enabled = True
        self._pace = Pace()

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown."""
        return self._is_enabled

    def disable(self) -> None:
        """Be quiet, as on every rank but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show again."""
        self._is_enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._pace = Pace()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the clock know."""
        if trainer.global_step:
            self._pace.record(trainer.global_step, time.monotonic())

    def _figures(self, *, with_validation: bool) -> list[str]:
        """Metrics as a person reads them."""
        parts: list[str] = []
        for name, value in self.get_metrics(self.trainer, self.trainer.lightning_module).items():
            # metrics stay with the trainer until they are logged anew
            if name == _VERSION or (name.startswith(VALIDATION) and not with_validation):
                continue
            if name == _SPEED and isinstance(value, float):
                parts.append(f"{value:,.0f} tokens/s")
                continue
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        return parts

    def _left(self, total: int | None) -> str:
        if total is None or total <= self.trainer.global_step:
            return ""
        seconds = self._pace.seconds_left(total, time.monotonic())
        return "" if seconds is None else f"{duration(seconds)} left"


class Bar(RunProgress):
    """A bar for the run, one for a validation beside it, and a line of metrics.

    Args:
        console: where to draw; None is this process's terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console
        self._drawn: _Drawn | None = None
        self._run: TaskID | None = None
        self._batches: TaskID | None = None
        self._began = 0.0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._drawn is None:
            super().print(*args, **kwargs)
        else:
            text = kwargs.get("sep", " ").join(map(str, args))
            self._drawn.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the run as it stands: one that goes on does not begin at 0."""
        super().on_train_start(trainer, pl_module)
        self._began = time.monotonic()
        drawn = self._open()
        if drawn is not None:
            total = total_steps(trainer)
            self._run = drawn.add_task("training", total=total, completed=trainer.global_step)
            self._show_run()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on with each optimizer step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._show_run()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw a bar for the validation, below the run's in `fit`."""
        if not trainer.sanity_checking:
            self._begin_batches("validating", trainer.num_val_batches)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Move on with each micro-batch."""
        self._one_batch()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it away again; what it found stays."""
        self._end_batches()
        self._show_run()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As a validation."""
        self._begin_batches("testing", trainer.num_test_batches)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """As a validation."""
        self._one_batch()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As a validation."""
        self._begin_batches("predicting", trainer.num_predict_batches)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """As a validation."""
        self._one_batch()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal as it was."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was, and the last state of the bar on it."""
        self._close()

    def _open(self) -> "_Drawn | None":
        if self._is_enabled and self._drawn is None:
            self._drawn = _Drawn(self._console)
            self._drawn.start()
        return self._drawn

    def _close(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
        self._drawn = self._run = self._batches = None

    def _show_run(self) -> None:
        if self._drawn is None or self._run is None:
            return
        step, total = self.trainer.global_step, total_steps(self.trainer)
        elapsed = str(timedelta(seconds=int(time.monotonic() - self._began)))
        told = [place(step, total), elapsed, self._left(total)]
        self._drawn.figures = " · ".join(self._figures(with_validation=True))
        self._drawn.update(self._run, completed=step, told=" · ".join(filter(None, told)))

    def _begin_batches(self, name: str, counts: list[int | float]) -> None:
        drawn = self._open()
        if drawn is not None:
            total = sum(counts)
            self._batches = drawn.add_task(name, total=None if total == float("inf") else total)
            self._one_batch(0)

    def _one_batch(self, advance: int = 1) -> None:
        if self._drawn is None or self._batches is None:
            return
        self._drawn.advance(self._batches, advance)
        (task,) = (one for one in self._drawn.tasks if one.id == self._batches)
        of = "" if task.total is None else f" of {int(task.total):,}"
        self._drawn.update(self._batches, told=f"batch {int(task.completed):,}{of}")

    def _end_batches(self) -> None:
        if self._drawn is not None and self._batches is not None:
            self._drawn.remove_task(self._batches)
        self._batches = None


class _Drawn(Progress):
    """Bars with a line of figures below them."""

    def __init__(self, console: Console | None) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.fields[told]}"),
            console=console,
            expand=True,
            refresh_per_second=_REDRAWN_PER_SECOND,
        )
        self.figures = ""

    def add_task(
        self,
        description: str,
        start: bool = True,
        total: float | None = 100.0,
        completed: int = 0,
        visible: bool = True,
        **fields: Any,
    ) -> TaskID:
        """Add a bar, of which nothing is told yet."""
        return super().add_task(description, start, total, completed, visible, told="", **fields)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn, from top to bottom."""
        yield from super().get_renderables()
        # before its parent is ready there are none
        if figures := getattr(self, "figures", ""):
            yield Padding(Text(figures), (0, 0, 0, 2))


class Lines(RunProgress):
    """One plain line every so many optimizer steps, and one after each validation.

    Args:
        every_n_steps: optimizer steps between two lines.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__()
        self._every_n_steps = max(1, every_n_steps)
        self._first_step = 0
        self._printed_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the run goes on."""
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Print the steps done; their metrics are known by now."""
        step = trainer.global_step
        if step > self._first_step and step % self._every_n_steps == 0:
            self._line(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the validation found."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._printed_step = -1
            self._line(trainer, is_validation=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last step."""
        self._line(trainer)

    def _line(self, trainer: Trainer, is_validation: bool = False) -> None:
        step = trainer.global_step
        if not self._is_enabled or step == self._printed_step:
            return
        self._printed_step = step
        total = total_steps(trainer)
        parts = [place(step, total), *self._figures(with_validation=is_validation)]
        sys.stdout.write("  ".join(filter(None, [*parts, self._left(total)])) + "\n")
        sys.stdout.flush()


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps that the whole run has, None where nothing limits them."""
    limits: list[int] = []
    if trainer.max_steps >= 0:
        limits.append(trainer.max_steps)
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and batches != float("inf"):
        limits.append(trainer.max_epochs * -(-int(batches) // trainer.accumulate_grad_batches))
    return min(limits) if limits else None
