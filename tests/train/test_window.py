"""A window that is not finite: what is said of it, what is saved and what is skipped."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from astrai_core.atomic_folder import read_last
from astrai_core.model import ModelConfig
from astrai_train.callbacks.checkpoint import FolderCheckpoint, FolderCheckpointIO
from astrai_train.callbacks.resume import Resume
from astrai_train.data.datasets import SEQDataset
from astrai_train.data.loader import ResumableLoader
from astrai_train.data.ragged import Ragged
from astrai_train.data.sampler import ResumableDistributedSampler
from astrai_train.data.storage import Storage
from astrai_train.modules import SEQModule
from astrai_train.schedules import ScheduleConfig
from astrai_train.window import NonFiniteError, Window

SMALL = ModelConfig(vocab_size=40, dim=16, n_layers=1, dim_ffn=16, n_heads=2, max_len=8)
POISON = 7


class Poisoned(SEQModule):
    """Its loss is NaN, or only its gradient infinite, where a batch has token `POISON`."""

    def __init__(self, kind: str = "loss", **options):
        torch.manual_seed(0)
        super().__init__(SMALL, compile=False, schedule=ScheduleConfig(total_steps=9), **options)
        self.kind = kind

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        total, count = super().loss(batch)
        if (batch["input_ids"] == POISON).any():
            self.seen = True
            if self.kind == "loss":
                total = total * torch.nan
            elif self.kind == "gradient":  # a root's slope at 0
                total = total + (self.model.output_weight[0, 0] * 0).sqrt()
        return total, count


class Data(L.LightningDataModule):
    """Documents of four equal tokens in order, two rows a batch; line n of the file has token n."""

    num_train_batches = 6

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        ids = Ragged.of([[n] * 4 for n in range(12)], np.uint16)
        storage = Storage("seq", {"input_ids": ids}, [("a.jsonl", 12)], np.arange(1, 13))
        rank, world = self.trainer.global_rank, self.trainer.world_size
        order = ResumableDistributedSampler(12, shuffle=False, rank=rank, world_size=world)
        return ResumableLoader(SEQDataset(storage, 4, 0), order, 2 // world)

    val_dataloader = train_dataloader


def fit(folder: Path, module: SEQModule, **options) -> None:
    given: dict[str, Any] = {
        "plugins": [FolderCheckpointIO(module)],
        "callbacks": [Resume(), FolderCheckpoint(every_minutes=0)],
        "max_epochs": 1, "devices": 1, "accumulate_grad_batches": 2, "log_every_n_steps": 1,
    }  # fmt: skip
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
        **given | options,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(), ckpt_path=read_last(folder / "checkpoints"))


def test_a_loss_that_is_not_finite_names_its_lines_after_a_checkpoint(tmp_path):
    """Token 7 is in row 7, the second of the fourth batch: of the second step."""
    blame = r"optimizer step 1 .*rank 0: loss, of row 6: a\.jsonl line 7, row 7: a\.jsonl line 8\)"
    with pytest.raises(NonFiniteError, match=blame):
        fit(tmp_path, Poisoned())
    last = read_last(tmp_path / "checkpoints")
    assert last is not None
    assert last.name == "step-00000001"


def test_a_gradient_that_is_not_finite_names_the_whole_window(tmp_path):
    with pytest.raises(NonFiniteError, match=r"gradient, all losses are finite, of row 4.*row 7"):
        fit(tmp_path, Poisoned("gradient"))


def test_the_saved_run_goes_on_as_one_that_had_no_bad_data(tmp_path):
    """Once the objective is mended; all of the trainer's state is compared, bit by bit."""
    with pytest.raises(NonFiniteError):
        fit(tmp_path / "stopped", Poisoned())
    for folder in ("stopped", "whole"):
        fit(tmp_path / folder, Poisoned("none"))
    files = ["model.safetensors", "trainer/state.safetensors", "trainer/state.json"]
    for file in files:
        stopped, whole = (
            (tmp_path / folder / "checkpoints/last" / file).read_bytes()
            for folder in ("stopped", "whole")
        )
        assert stopped == whole, file


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_skipped_step_changes_no_weight_and_is_counted(tmp_path, kind, caplog):
    module = Poisoned(kind, on_nonfinite="skip")
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, module, max_steps=2)
    short = Poisoned(kind)
    fit(tmp_path / "short", short, max_steps=1)
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, short.model.state_dict()[name]), name
    assert "step 1 is skipped: rank 0" in caplog.text
    assert module.trainer.callback_metrics["train/skipped_steps"] == 1
    assert module.trainer.callback_metrics["train/loss"].isfinite()


@pytest.mark.dist
def test_ranks_skip_together_and_the_rank_is_named(tmp_path, caplog):
    """The poisoned row is the second of its batch, which rank 1 has."""

    class Telling(Poisoned):
        def on_train_end(self):
            file = tmp_path / f"rank-{self.global_rank}"
            file.write_text(f"{hasattr(self, 'seen')} {self.trainer.callback_metrics}")
            torch.save(self.model.state_dict(), tmp_path / f"{self.global_rank}.pt")

    with pytest.raises(
        Exception, match=r"rank 0: gradient.*rank 1: loss, of row 7: a\.jsonl line 8"
    ):
        fit(tmp_path / "stop", Poisoned(), devices=2, strategy="ddp_fork")
    # Lightning's launcher of forks hands the weights back through a plugin of one file
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork", "plugins": [], "callbacks": []}
    fit(tmp_path / "skip", Telling(on_nonfinite="skip"), enable_checkpointing=False, **two)
    told = [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)]
    assert [text.split()[0] for text in told] == ["False", "True"]
    assert all("'train/skipped_steps': tensor(1.)" in text for text in told)
    weights = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_window_without_a_label_counts_nothing():
    window = Window()
    window.add(torch.tensor(0.0), torch.tensor(0), torch.tensor([-1, -1]))
    assert (window.loss.item(), window.count.item()) == (0, 0)
    assert window.blame(3).startswith("rank 3: gradient, all losses are finite, of a batch without")
