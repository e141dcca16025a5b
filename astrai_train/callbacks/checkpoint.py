"""Checkpoints are model folders, servable as they are, with the trainer's state beside the weights.

    <default_root_dir>/checkpoints/
        step-00000200/   config.json  model.safetensors  tokenizer.json ...  trainer/
        last -> step-00000200

One is written only between two optimizer steps, where no gradient is pending: what a training run
is at that moment is the weights and what `trainer/` holds, nothing else.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from torch import Tensor

from astrai_core.atomic_folder import point_last, read_last
from astrai_core.checkpoint import Checkpoint
from astrai_train.callbacks.resume import Boundary, settle_loops

FOLDER = "checkpoints"
_MODEL = "model."
_STATE = "state_dict"
_MODULE = "module_state"
_VERSION = "pytorch-lightning_version"


def has_state(folder: Path) -> bool:
    """Whether a run can go on from a folder, which otherwise holds weights alone."""
    return (folder / "trainer").is_dir()


class CheckpointError(OSError):
    """A checkpoint could not be written; the message names the disk's reason and what is whole."""


class FolderCheckpointIO(CheckpointIO):
    """Lightning's checkpoint dictionary as a checkpoint folder, without pickle.

    Args:
        module: has the `Transformer` as `model` and may have a `tokenizer`, saved beside it.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Write the folder at once or not at all."""
        state = dict(checkpoint)
        weights: dict[str, Tensor] = state.pop(_STATE)
        state[_MODULE] = {
            name: tensor for name, tensor in weights.items() if not name.startswith(_MODEL)
        }
        content = Checkpoint.of_model(
            self._module.model,  # pyright: ignore[reportArgumentType]
            getattr(self._module, "tokenizer", None),
            state,
        )
        content.model_state = {
            name.removeprefix(_MODEL): tensor
            for name, tensor in weights.items()
            if name.startswith(_MODEL)
        }
        content.save(path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[[Any], Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint folder, or a plain model folder, which restores weights alone.

        Raises:
            ValueError: something is missing, truncated or of another architecture.
        """
        content = Checkpoint.load(path)
        wanted = getattr(self._module.model, "config", None)
        if wanted is not None and content.model_config != wanted:
            raise ValueError(
                f"{path} holds a model of another architecture than the configuration describes; "
                "pass the configuration that it was trained with (config.yaml of its run)"
            )
        state: dict[str, Any] = dict(content.trainer_state or {_VERSION: lightning.__version__})
        state[_STATE] = {_MODEL + name: tensor for name, tensor in content.model_state.items()}
        state[_STATE] |= state.pop(_MODULE, {})
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint folder."""
        shutil.rmtree(path)


class FolderCheckpoint(CheckpointCallback):
    """Save the run every so many steps, every so many minutes, and at its end.

    Args:
        every_n_steps: save each time so many optimizer steps are done; 0 leaves it to the clock.
        every_minutes: save when the last checkpoint is so old; 0 leaves it to the steps.
        keep: so many of the newest checkpoints stay on disk.
    """

    def __init__(self, every_n_steps: int = 0, every_minutes: float = 10.0, keep: int = 2) -> None:
        if every_n_steps < 0 or every_minutes < 0:
            raise ValueError(
                "checkpoint.every_n_steps and checkpoint.every_minutes must not be negative, "
                f"not {every_n_steps} and {every_minutes}"
            )
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, not {keep}")
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._boundary: Boundary | None = None
        self._is_untouched = True
        self._is_due = False

    @property
    def is_between_steps(self) -> bool:
        """Whether the run, as it is now, is on disk or can be saved."""
        return self._boundary is not None or self._is_untouched

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sweep away what a killed process left of a checkpoint."""
        if stage == "fit" and trainer.is_global_zero:
            for leftover in self._root(trainer).glob(".tmp-*"):
                leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run just resumed has its checkpoint already."""
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._boundary = None
        self._is_untouched = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the moment, if this batch ended an optimizer step, and whether it is to be saved."""
        self._is_untouched = False
        self._boundary = Boundary.after_batch(trainer)
        self._is_due = self._boundary is not None and self._should_save(trainer)

    # whichever comes next saves: by then the module has counted and logged its last step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save between two batches."""
        self._save_if_due(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before a validation, so that a kill does not cost the steps before it."""
        self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save between two epochs."""
        self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what came after the last checkpoint."""
        if self._boundary is not None:
            self._boundary = self._boundary.after_validation(trainer)
        self.save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not save, and settle what it saves in the middle of things."""
        if self._boundary is None:
            raise RuntimeError("a checkpoint is possible only after an optimizer step")
        checkpoint["boundary"] = self._boundary.kind
        checkpoint["random"] = self._boundary.random
        settle_loops(checkpoint["loops"]["fit_loop"], self._boundary)

    def save(self, trainer: Trainer) -> None:
        """Save the last step boundary, unless that is done or a step has begun since.

        Raises:
            CheckpointError: the disk is full or not writable; the older checkpoints are whole.
        """
        step = trainer.global_step
        if self._boundary is None or step == self._saved_step or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        folder = self._root(trainer) / f"step-{step:08d}"
        try:
            trainer.save_checkpoint(folder, weights_only=False)
            if trainer.is_global_zero:
                point_last(folder)
                self._prune(folder)
        except OSError as error:
            last = read_last(folder.parent)
            rest = f"{last} is whole" if last else "there is no older one"
            raise CheckpointError(
                f"cannot write the checkpoint {folder}: {error.strerror or error}; {rest}: "
                "free some space and run the same command again"
            ) from error
        self._saved_step = step
        self._saved_at = time.monotonic()

    def _save_if_due(self, trainer: Trainer) -> None:
        if self._is_due:
            self.save(trainer)
        self._is_due = False

    def _should_save(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        by_step = self.every_n_steps > 0 and step % self.every_n_steps == 0
        age = time.monotonic() - self._saved_at
        by_clock = self.every_minutes > 0 and age >= 60 * self.every_minutes
        if trainer.world_size > 1:
            by_clock = trainer.strategy.broadcast(by_clock)
        return by_step or by_clock or step == trainer.max_steps

    def _prune(self, newest: Path) -> None:
        # a later step can be there: cut off before `last` moved to it, and written again some day
        found = sorted(old for old in newest.parent.glob("step-*") if old.name <= newest.name)
        for old in found[: -self.keep]:
            shutil.rmtree(old)

    @staticmethod
    def _root(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / FOLDER
