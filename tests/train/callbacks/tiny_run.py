"""A training run small enough for a test, whose every random generator matters to the weights.

It is named by `class_path` too, in processes that have this folder on their path.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from astrai_core.model import ModelConfig, Transformer
from astrai_train.callbacks.checkpoint import FolderCheckpoint, FolderCheckpointIO
from astrai_train.callbacks.preemption import Preemption
from astrai_train.callbacks.resume import Resume

CONFIG = ModelConfig(vocab_size=32, dim=8, n_layers=1, dim_ffn=16, n_heads=2)


class TinyModule(LightningModule):
    """Next-token prediction, with noise from Python, NumPy and torch added to the loss."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.model = Transformer(CONFIG)
        self.tokenizer = None
        self.lr = lr
        self.seen: list[list[int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch[:, 0].tolist())
        logits = self.model(batch)["logits"]
        drawn = numpy.random.random_sample()  # noqa: NPY002 - the generator that a run has
        noise = 1 + random.random() + drawn + torch.rand(())
        loss = noise * functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        )
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/noise", torch.rand(()) + random.random())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Rows(Dataset[Tensor]):
    """Row n begins with n."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return (torch.arange(6) * 7 + index) % 32


class Loader:
    """Shuffles each epoch by its number; counts the batches that training took."""

    def __init__(self, rows: Rows, num_workers: int) -> None:
        self.rows, self.num_workers = rows, num_workers
        self.epoch, self.taken = 0, 0

    def __len__(self) -> int:
        return len(self.rows) // 2

    def __iter__(self) -> Iterator[Tensor]:
        if self.taken >= len(self):
            self.epoch, self.taken = self.epoch + 1, 0
        order = torch.randperm(
            len(self.rows), generator=torch.Generator().manual_seed(self.epoch)
        ).tolist()
        rest = torch.utils.data.Subset(self.rows, order[2 * self.taken :])
        for batch in DataLoader(rest, batch_size=2, num_workers=self.num_workers):
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.taken = state["epoch"], state["taken"]


class TinyData(LightningDataModule):
    """Ten training rows of five batches, four rows to validate on."""

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> Loader:
        return Loader(Rows(10), self.num_workers)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Rows(4), batch_size=2)


class Kill(Callback):
    """Raise at a moment, as a killed process would stop there."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._raise)

    def _raise(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step:
            raise KilledError


class KilledError(Exception):
    """The moment has come."""


def trainer(folder: Path, module: LightningModule, *callbacks: Callback, **options: Any) -> Trainer:
    """Build a trainer with our callbacks; `every` is `FolderCheckpoint.every_n_steps`."""
    kept = {name: options.pop(name) for name in ("best", "mode") if name in options}
    checkpoint = FolderCheckpoint(every_n_steps=options.pop("every", 1), every_minutes=0, **kept)
    return Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
        }
        | options,
        default_root_dir=folder,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[FolderCheckpointIO(module)],
        callbacks=[Resume(), Preemption(checkpoint), checkpoint, *callbacks],
    )
