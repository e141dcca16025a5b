import io
import pickletools
import resource
from pathlib import Path

import pytest
import torch

from astrai_core.atomic_folder import read_last
from astrai_core.checkpoint import Checkpoint
from astrai_core.model import AutoModel
from astrai_train.callbacks.checkpoint import CheckpointError, FolderCheckpoint, FolderCheckpointIO

from .tiny_run import TinyData, TinyModule, trainer


def fit(folder: Path, **options) -> TinyModule:
    module = TinyModule()
    trainer(folder, module, **options).fit(module, datamodule=TinyData())
    return module


def test_a_checkpoint_is_a_model_folder(tmp_path):
    module = fit(tmp_path, max_epochs=1)
    last = read_last(tmp_path / "checkpoints")
    assert last is not None
    ids = torch.arange(8)[None]
    loaded = AutoModel.from_pretrained(last)
    assert torch.equal(loaded(ids)["logits"], module.model.eval()(ids)["logits"])


def test_only_the_newest_stay_and_last_names_the_newest(tmp_path):
    fit(tmp_path, max_epochs=1, every=1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last", "step-00000004", "step-00000005"]
    assert (tmp_path / "checkpoints" / "last").resolve().name == "step-00000005"


class Scored(TinyModule):
    """Its validations, each after two steps, say what they are told to."""

    scores = (5.0, 3.0, 4.0, 3.0, 6.0, 5.0)

    def validation_step(self, batch, batch_idx):
        self.log("val/score", self.scores[self.trainer.global_step // 2 - 1])


@pytest.mark.parametrize(("mode", "best"), [("min", "step-00000004"), ("max", "step-00000010")])
def test_the_best_stays_beside_the_newest(tmp_path, mode, best):
    """Twelve steps with a checkpoint each; the second of two equal values is no better."""
    module = Scored()
    options = {"max_steps": 12, "max_epochs": -1, "val_check_interval": 2}
    options |= {"check_val_every_n_epoch": None, "best": "val/score", "mode": mode}
    trainer(tmp_path, module, **options).fit(module, datamodule=TinyData())
    root = tmp_path / "checkpoints"
    assert (root / "best").resolve().name == best
    names = {path.name for path in root.glob("step-*")}
    assert names == {best, "step-00000011", "step-00000012"}


def test_a_metric_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    module = TinyModule()
    run = trainer(tmp_path, module, max_epochs=1, best="val/loss")
    with pytest.raises(ValueError, match=r"checkpoint\.best is val/loss.*choose one of val/noise"):
        run.fit(module, datamodule=TinyData())
    module = TinyModule()
    run = trainer(tmp_path, module, max_epochs=1, best="val/loss", limit_val_batches=0)
    with pytest.raises(ValueError, match="this run has no validation"):
        run.fit(module, datamodule=TinyData())


def test_nothing_is_pickled(tmp_path):
    fit(tmp_path, max_epochs=1)
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        with pytest.raises(ValueError, match="opcode"):
            list(pickletools.genops(io.BytesIO(path.read_bytes())))


def test_no_checkpoint_is_made_inside_an_accumulation_window(tmp_path):
    fit(tmp_path, max_epochs=1, accumulate_grad_batches=2, every=1)
    last = read_last(tmp_path / "checkpoints")
    assert last is not None
    state = Checkpoint.load(last).trainer_state
    assert state is not None
    # five batches: two windows of two and a short one
    assert state["global_step"] == 3
    assert last.name == "step-00000003"


def test_a_full_disk_says_what_is_whole(tmp_path):
    fit(tmp_path, max_epochs=1)
    before = read_last(tmp_path / "checkpoints")
    module = TinyModule()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000005 is whole: free some space"):
            trainer(tmp_path, module, max_epochs=2).fit(
                module, datamodule=TinyData(), ckpt_path=before
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_last(tmp_path / "checkpoints") == before
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_leftovers_of_a_killed_process_are_swept_away(tmp_path):
    leftover = tmp_path / "checkpoints" / ".tmp-step-00000009-1"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    fit(tmp_path, max_epochs=1)
    assert not leftover.exists()


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    fit(tmp_path, max_epochs=1)
    other = TinyModule()
    other.model = AutoModel.from_config(type(other.model.config)(vocab_size=16, dim=8, n_heads=2))
    last = read_last(tmp_path / "checkpoints")
    assert last is not None
    with pytest.raises(ValueError, match="another architecture"):
        FolderCheckpointIO(other).load_checkpoint(last)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0}, "checkpoint.keep must be at least 1, not 0"),
        ({"every_n_steps": -1}, "checkpoint.every_n_steps"),
        ({"every_minutes": -1.0}, "checkpoint.every_minutes"),
    ],
)
def test_settings_that_cannot_be_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        FolderCheckpoint(**options)
