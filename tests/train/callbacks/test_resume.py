"""Every moment at which a run can stop, in one process; tests/e2e has real ones."""

import random
from pathlib import Path

import numpy
import pytest
import torch
from lightning import seed_everything
from safetensors.torch import load_file

from astrai_core.atomic_folder import read_last
from astrai_train.callbacks.resume import (
    changed_keys,
    random_of_rank,
    random_state,
    set_random_state,
)

from .tiny_run import Kill, KilledError, TinyData, TinyModule, trainer

STEPS = {"max_epochs": -1, "max_steps": 9}
RUNS = {
    "epochs": {"max_epochs": 2},
    "windows": {"max_epochs": 2, "accumulate_grad_batches": 2},
    "validations": {"max_epochs": 2, "val_check_interval": 2},
    "no-validation": {"max_epochs": 2, "limit_val_batches": 0},
    "steps": STEPS | {"val_check_interval": 2},
    "steps-no-validation": STEPS | {"limit_val_batches": 0},
    "steps-across-epochs": STEPS | {"check_val_every_n_epoch": None, "val_check_interval": 3},
}
HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_train_epoch_end",
    "on_train_epoch_start",
)


QUICK = ("validations", "windows", "steps-across-epochs")
"""In each test run; the others are slow proofs."""


def fit(folder: Path, options: dict, kill: Kill | None = None) -> TinyModule:
    seed_everything(1)
    module = TinyModule()
    callbacks = [kill] if kill is not None else []
    run = trainer(folder, module, *callbacks, **options)
    last = read_last(folder / "checkpoints")
    try:
        run.fit(module, datamodule=TinyData(), ckpt_path=last)
    except KilledError:
        assert kill is not None
    return module


def content(folder: Path) -> tuple[str, str, dict[str, torch.Tensor]]:
    last = read_last(folder / "checkpoints")
    assert last is not None
    tensors = load_file(last / "model.safetensors") | load_file(last / "trainer/state.safetensors")
    return last.name, (last / "trainer/state.json").read_text(), tensors


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in RUNS]
)
def test_a_run_stopped_anywhere_ends_the_same(tmp_path, name):
    options = RUNS[name]
    fit(tmp_path / "whole", options)
    last, state, tensors = content(tmp_path / "whole")
    for hook in HOOKS:
        for step in (3, 5):
            folder = tmp_path / f"{hook}-{step}"
            fit(folder, options, Kill(hook, step))
            fit(folder, options)
            resumed = content(folder)
            assert resumed[:2] == (last, state), (hook, step)
            assert resumed[2].keys() == tensors.keys()
            different = [key for key in tensors if not torch.equal(tensors[key], resumed[2][key])]
            assert different == [], (hook, step)


def test_batches_come_once_each_and_in_order(tmp_path):
    whole = fit(tmp_path / "whole", {"max_epochs": 2}).seen
    before = fit(tmp_path / "stopped", {"max_epochs": 2}, Kill("on_train_batch_end", 4)).seen
    after = fit(tmp_path / "stopped", {"max_epochs": 2}).seen
    # the fourth batch was trained on and not saved
    assert before[:3] + after == whole


def test_random_numbers_go_on_where_they_were():
    state = random_state()
    first = random.random(), numpy.random.random_sample(), torch.rand(3)  # noqa: NPY002
    set_random_state(state)
    again = random.random(), numpy.random.random_sample(), torch.rand(3)  # noqa: NPY002
    assert first[:2] == again[:2]
    assert torch.equal(first[2], again[2])


def test_each_rank_has_its_own_random_numbers_and_a_new_one_those_of_its_number():
    seed_everything(3)
    saved = [random_state()]
    torch.rand(1)
    saved.append(random_state())
    assert random_of_rank(saved, 1, step=5) is saved[1]
    third = random_of_rank(saved, 2, step=5)
    assert torch.equal(third["torch"], random_of_rank(saved, 2, step=5)["torch"])
    others = [*saved, random_of_rank(saved, 3, step=5), random_of_rank(saved, 2, step=6)]
    assert not any(torch.equal(third["torch"], one["torch"]) for one in others)
    assert torch.equal(random_state()["torch"], saved[1]["torch"])


def test_a_changed_key_is_named_with_both_values():
    old = {"trainer": {"max_steps": 5, "precision": "32"}, "model": {"init_args": {"lr": 0.1}}}
    new = {"trainer": {"max_steps": 9, "precision": "16"}, "model": {"init_args": {"lr": 0.1}}}
    assert changed_keys(old, new) == ["trainer.precision was '32' and is now '16'"]
    assert changed_keys(old, old | {"trainer": old["trainer"] | {"max_time": "1:00"}}) == []


def test_reports_may_change_and_other_callbacks_may_not():
    samples = {"class_path": "astrai_train.callbacks.samples.Samples", "init_args": {}}
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    none = {"trainer": {"callbacks": None}}
    assert changed_keys(none, {"trainer": {"callbacks": [samples]}}) == []
    (line,) = changed_keys(none, {"trainer": {"callbacks": [samples, stopping]}})
    assert line.startswith("trainer.callbacks was None and is now [{'class_path': 'lightning")
