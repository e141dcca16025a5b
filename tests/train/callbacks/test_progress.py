import pytest

from astrai_train.callbacks.progress import Lines, total_steps
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
