"""What `astrai-train predict` writes: `predictions.jsonl` of the run, an object on each line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from astrai_train.window import over_ranks

PREDICTIONS = "predictions.jsonl"


class Predictions(Callback):
    """Writes what `predict_step` returns: lists of dicts, from all ranks.

    A module with `predictions(parts)` makes the lines of all of them together. The file is there
    when it is whole.
    """

    def __init__(self) -> None:
        self._parts: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._parts = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: list[dict[str, Any]],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the parts of a batch."""
        self._parts.extend(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the lines."""
        parts = [part for parts in over_ranks(self._parts) for part in parts]
        make: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None
        make = getattr(pl_module, "predictions", None)
        lines = parts if make is None else make(parts)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{PREDICTIONS}"
        with temporary.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        temporary.replace(folder / PREDICTIONS)
