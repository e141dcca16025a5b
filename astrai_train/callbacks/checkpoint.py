"""Checkpoints are model folders, servable as they are, with the trainer's state beside the weights.

    <default_root_dir>/checkpoints/
        step-00000200/   config.json  model.safetensors  tokenizer.json ...  trainer/
        last -> step-00000200

Those of a LoRA run are adapter folders: `adapter_config.json` and `adapter_model.safetensors` take
the place of the model's, whose frozen weights stay where they are.

One is written only between two optimizer steps, where no gradient is pending: what a training run
is at that moment is the weights and what `trainer/` holds, nothing else.
"""

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from torch import Tensor

from astrai_core.atomic_folder import point, point_last, read_last
from astrai_core.checkpoint import Checkpoint
from astrai_core.model import Transformer
from astrai_train.callbacks.layout import Layout
from astrai_train.callbacks.resume import Boundary, settle_loops
from astrai_train.window import NonFiniteError, over_ranks

_log = logging.getLogger(__name__)

FOLDER = "checkpoints"
STATE = "trainer"
OBJECTIVE = "objective"
"""Entry of the state: the name of the module's class."""
BEST = "best"
_MODEL = "model."
_STATE = "state_dict"
_MODULE = "module_state"
_VERSION = "pytorch-lightning_version"


def has_state(folder: Path) -> bool:
    """Whether a run can go on from a folder, which otherwise holds weights alone."""
    return (folder / STATE).is_dir()


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
        content.model_state = {name: weights[_MODEL + name] for name in content.model_state}
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
        model = self._module.model
        assert isinstance(model, torch.nn.Module)
        wanted = getattr(model, "config", None)
        if wanted is not None and content.model_config != wanted:
            raise ValueError(
                f"{path} holds a model of another architecture than the configuration describes; "
                "pass the configuration that it was trained with (config.yaml of its run)"
            )
        _refuse_other_adapter(Path(path), content, model)
        state: dict[str, Any] = dict(content.trainer_state or {_VERSION: lightning.__version__})
        # the frozen weights below an adapter are the module's own, read from the base's folder
        whole = content.model_state if content.adapter is None else model.state_dict()
        whole = {**whole, **content.model_state}
        state[_STATE] = {_MODEL + name: tensor for name, tensor in whole.items()}
        state[_STATE] |= state.pop(_MODULE, {})
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint folder."""
        shutil.rmtree(path)


def _refuse_other_adapter(path: Path, content: Checkpoint, model: torch.nn.Module) -> None:
    """Check that a checkpoint has adapters where the run has them, over the same base."""
    found = content.adapter
    wanted = model.adapter if isinstance(model, Transformer) else None
    if wanted is None:
        if found is not None:
            raise ValueError(f"{path} holds a LoRA adapter, but the configuration has no lora")
        return
    if found is None:
        raise ValueError(
            f"{path} holds a whole model, but the configuration trains a LoRA adapter; to begin "
            "with its weights, name it in model.init_args.init_from"
        )
    own = {name for name in model.state_dict() if name.endswith(("lora_A", "lora_B"))}
    if (found.config.rank, found.config.scale) != (wanted.config.rank, wanted.config.scale) or (
        own != content.model_state.keys()
    ):
        raise ValueError(
            f"{path} holds a LoRA adapter of another rank, scale or other layers than the "
            "configuration describes; pass the one that it was trained with (config.yaml of its "
            "run)"
        )
    if found.base_digest != wanted.base_digest:
        raise ValueError(
            f"{path} was trained over other weights than {wanted.base} holds now: the base has "
            "changed"
        )


class FolderCheckpoint(CheckpointCallback):
    """Save the run every so many steps, every so many minutes, and at its end.

    Args:
        every_n_steps: save each time so many optimizer steps are done; 0 leaves it to the clock.
        every_minutes: save when the last checkpoint is so old; 0 leaves it to the steps.
        keep: so many of the newest checkpoints stay on disk.
        best: metric of the validation, as `val/loss`, by which the best checkpoint stays too: the
            link `best`, beside `last`, names it. Null keeps the newest ones alone.
        mode: whether the best value is the least or the greatest.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        every_minutes: float = 10.0,
        keep: int = 2,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
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
        self.best = best
        self.mode = mode
        self._best_value: float | None = None
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._boundary: Boundary | None = None
        self._last_boundary: Boundary | None = None
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
        self._boundary = self._last_boundary = None
        self._is_untouched = True
        if self.best is not None and not trainer.num_val_batches:
            raise ValueError(
                f"checkpoint.best is {self.best}, but this run has no validation: set data.val, or "
                "checkpoint.best to null"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the moment, if this batch ended an optimizer step, and whether it is to be saved."""
        self._is_untouched = False
        self._boundary = Boundary.after_batch(trainer)
        self._last_boundary = self._boundary or self._last_boundary
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

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the run as it is if no validation was better."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.best is not None:
            self._keep_if_best(trainer, self.best)
        if self._last_boundary is not None:
            self._last_boundary = self._last_boundary.after_validation(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the step before one that is not finite: no weight has changed since."""
        if isinstance(exception, NonFiniteError):
            self._boundary = self._last_boundary
            self.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what the best checkpoint is measured against."""
        return {} if self._best_value is None else {"best_value": self._best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._best_value = state_dict.get("best_value")

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
        checkpoint[OBJECTIVE] = type(pl_module).__name__
        checkpoint["boundary"] = self._boundary.kind
        checkpoint["random"] = over_ranks(self._boundary.random)
        datamodule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        checkpoint["layout"] = dataclasses.asdict(Layout.of(trainer, pl_module, datamodule))
        settle_loops(checkpoint["loops"]["fit_loop"], self._boundary)

    def save(self, trainer: Trainer) -> None:
        """Save the last step boundary, unless that is done or a step has begun since.

        Raises:
            CheckpointError: the disk is full or not writable; the older checkpoints are whole.
        """
        step = trainer.global_step
        if self._boundary is None or step == self._saved_step or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        folder = self._folder(trainer)
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

    def _keep_if_best(self, trainer: Trainer, metric: str) -> None:
        found = trainer.callback_metrics.get(metric)
        if found is None:
            names = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise ValueError(
                f"checkpoint.best is {metric}, which this run does not report: choose one of "
                f"{', '.join(names)}"
            )
        if not self.is_between_steps:
            _log.warning(
                "checkpoint.best: the validation in step %d is within an accumulation window, "
                "where no checkpoint is possible; it is passed over. Let trainer."
                "val_check_interval be a multiple of trainer.accumulate_grad_batches",
                trainer.global_step,
            )
            return
        value, before = float(found), self._best_value
        if before is None or (value < before if self.mode == "min" else value > before):
            # on disk it still has the old value, since it begins with this validation
            self.save(trainer)
            self._best_value = value
            folder = self._folder(trainer)
            if trainer.is_global_zero and folder.is_dir():  # before the first step there is none
                point(folder, BEST)

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
        best = (newest.parent / BEST).resolve()
        for old in found[: -self.keep]:
            if old.resolve() != best:
                shutil.rmtree(old)

    @classmethod
    def _folder(cls, trainer: Trainer) -> Path:
        return cls._root(trainer) / f"step-{trainer.global_step:08d}"

    @staticmethod
    def _root(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / FOLDER
