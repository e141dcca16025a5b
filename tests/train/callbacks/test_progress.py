import re
from io import StringIO

import pytest
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from astrai_train.callbacks.progress import Bar, Lines, total_steps
from astrai_train.wording import duration

from .tiny_run import TinyData, TinyModule, trainer


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (7384, "2 h 03 min")],
)
def test_a_duration_is_said_as_people_say_it(seconds, text):
    assert duration(seconds) == text


def test_a_line_comes_every_so_many_steps_and_after_validations(tmp_path, capsys):
    module = TinyModule()
    run = trainer(tmp_path, module, Lines(every_n_steps=2), max_epochs=1, enable_progress_bar=True)
    run.fit(module, datamodule=TinyData())
    steps = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["step 2 of 5", "step 4 of 5", "step 5 of 5"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2}, 10),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": 2, "max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 3}, 3),
    ],
)
def test_the_steps_of_a_run_are_those_it_does(tmp_path, options, steps):
    module = TinyModule()
    run = trainer(tmp_path, module, **options)
    run.fit(module, datamodule=TinyData())
    assert total_steps(run) == run.global_step == steps


class Drawing(Bar):
    """A bar on a terminal of its own, whose frames are kept."""

    def __init__(self):
        self.output = StringIO()
        super().__init__(Console(file=self.output, force_terminal=True, width=100))
        self.frames: list[str] = []

    def on_train_batch_end(self, *args, **kwargs):
        super().on_train_batch_end(*args, **kwargs)
        self.frames.append(self.frame())

    def on_validation_batch_end(self, *args, **kwargs):
        super().on_validation_batch_end(*args, **kwargs)
        self.frames.append(self.frame())

    def frame(self):
        assert self._drawn is not None
        console = Console(width=100, record=True, file=StringIO())
        for part in self._drawn.get_renderables():
            console.print(part)
        return console.export_text()


@pytest.mark.parametrize(
    ("options", "done", "total"),
    [
        ({"max_epochs": 2}, 10, 10),
        ({"max_epochs": -1, "max_steps": 7}, 7, 7),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6, 6),
    ],
)
def test_the_bar_tells_of_the_run_and_not_of_an_epoch(tmp_path, options, done, total):
    module, bar = TinyModule(), Drawing()
    run = trainer(tmp_path, module, bar, **options, enable_progress_bar=True)
    run.fit(module, datamodule=TinyData())
    told = [re.search(r"step (\d+) of (\d+)", frame) for frame in bar.frames]
    steps = [int(one.group(1)) for one in told if one]
    assert sorted(set(steps)) == [*range(min(steps), done + 1)]
    assert steps == sorted(steps)
    assert {int(one.group(2)) for one in told if one} == {total}
    assert "poch" not in bar.output.getvalue()
    assert any(f"step {done - 1} of" in frame and " left" in frame for frame in bar.frames)
    assert not any(f"step {done} of" in frame and " left" in frame for frame in bar.frames)
    assert any(re.search(r"validating .* batch \d of \d", frame) for frame in bar.frames)
    assert "\x1b[?25h" in bar.output.getvalue()  # the cursor is back


def test_what_is_printed_while_a_bar_is_drawn_stands_above_it(tmp_path):
    module, bar = TinyModule(), Drawing()

    class Talking(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.print(f"[bold] after batch {batch_idx}")

    run = trainer(tmp_path, module, Talking(), bar, max_epochs=1, enable_progress_bar=True)
    run.fit(module, datamodule=TinyData())
    output = bar.output.getvalue()
    # markup of rich's own is text here, as whatever a model says is
    assert output.count("[bold] after batch") == 5
    assert output.rindex("[bold] after batch 4") < output.rindex("step 5 of 5")


def test_a_failing_run_gives_the_terminal_back(tmp_path):
    module, bar = TinyModule(), Drawing()

    class Failing(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("as meant")

    run = trainer(tmp_path, module, Failing(), bar, max_epochs=1, enable_progress_bar=True)
    with pytest.raises(RuntimeError, match="as meant"):
        run.fit(module, datamodule=TinyData())
    assert bar.output.getvalue().endswith("\x1b[?25h")


def test_speed_and_losses_are_told_as_people_read_them(tmp_path, capsys):
    module = TinyModule()

    class Logging(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.log("train/tokens_per_s", 12345.6, prog_bar=True)
            pl_module.log("train/loss", 1.23456, prog_bar=True)

    lines = Lines(every_n_steps=5)
    run = trainer(tmp_path, module, Logging(), lines, max_epochs=1, enable_progress_bar=True)
    run.fit(module, datamodule=TinyData())
    assert "step 5 of 5  12,346 tokens/s  train/loss 1.235\n" in capsys.readouterr().out
