import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from astrai_core.atomic_folder import read_last
from astrai_train.callbacks.preemption import Preemption, StoppedBySignalError

from .test_resume import content, fit
from .tiny_run import TinyData, TinyModule, trainer


class Signal(Callback):
    """Sends a signal to its own process, once, from a hook."""

    def __init__(self, hook: str, number: int, step: int) -> None:
        self.number, self.step = number, step
        setattr(self, hook, self._send)

    def _send(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), self.number)


def stop(folder: Path, signalling: Signal, **options: Any) -> StoppedBySignalError:
    module = TinyModule()
    run = trainer(folder, module, signalling, every=0, **options)
    with pytest.raises(StoppedBySignalError) as stopped:
        run.fit(module, datamodule=TinyData())
    return stopped.value


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_next_step_and_has_its_exit_code(tmp_path, number, code):
    # after the first batch of the second window: the step that it belongs to is finished first
    hook = Signal("on_train_batch_start", number, step=1)
    stopped = stop(tmp_path, hook, accumulate_grad_batches=2)
    assert (stopped.exit_code, stopped.step) == (code, 2)
    last = read_last(tmp_path / "checkpoints")
    assert last is not None
    assert last.name == "step-00000002"


def test_a_signal_before_the_first_batch_stops_the_run_there(tmp_path):
    """Lightning has its own handler until then, and would end with status 0 after a batch."""
    hook = Signal("on_train_start", signal.SIGTERM, step=0)
    module = TinyModule()
    run = trainer(tmp_path, module, hook, every=0)
    callbacks: list[Callback] = run.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    # in a run, those of the user come before ours
    callbacks.sort(key=lambda one: isinstance(one, Preemption))
    assert callbacks[-1] is not hook
    with pytest.raises(StoppedBySignalError) as stopped:
        run.fit(module, datamodule=TinyData())
    assert (stopped.value.exit_code, stopped.value.step) == (143, 0)


def test_the_handlers_before_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop(tmp_path, Signal("on_train_batch_end", signal.SIGTERM, step=2))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(
    "hook", ["on_train_batch_end", "on_validation_start", "on_validation_batch_end"]
)
def test_a_run_stopped_by_a_signal_ends_the_same(tmp_path, hook):
    options = {"max_epochs": 2, "val_check_interval": 2, "every": 0}
    fit(tmp_path / "whole", dict(options))
    seed_everything(1)
    module = TinyModule()
    signalling = Signal(hook, signal.SIGTERM, step=4)
    with pytest.raises(StoppedBySignalError):
        trainer(tmp_path / "stopped", module, signalling, **options).fit(
            module, datamodule=TinyData()
        )
    last = read_last(tmp_path / "stopped" / "checkpoints")
    assert last is not None
    assert last.name == "step-00000004"
    fit(tmp_path / "stopped", dict(options))
    whole, stopped = content(tmp_path / "whole"), content(tmp_path / "stopped")
    assert whole[:2] == stopped[:2]
    assert all((whole[2][name] == stopped[2][name]).all() for name in whole[2])
