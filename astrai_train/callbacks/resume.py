"""Going on where a run stopped, so that nothing but the clock tells it from one never stopped.

Lightning restores weights, optimizer, schedule and counters. Its counters, saved in the middle of
its loops, lead into a dozen half-states on the way back (a validation run twice or not at all, an
epoch counted once too little). So a checkpoint knows three moments only, all of them between two
optimizer steps: between two batches, before a validation that is due, and between two epochs.
`settle_loops` writes Lightning's counters for each, and `Resume` restores what Lightning does not
save: the random numbers, of each rank its own.

With another number of ranks a run goes on with the same rows in each step; see `Layout`.
"""

# Lightning has no public way to ask where its loops are
# pyright: reportPrivateUsage=false

import copy
import dataclasses
import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from astrai_train.callbacks.layout import Layout
from astrai_train.metrics_file import MetricsFile

_OPTIMIZATION = "epoch_loop.automatic_optimization.optim_progress"

BoundaryKind = Literal["batch", "validation", "epoch"]


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A moment between two optimizer steps, when a checkpoint is possible."""

    kind: BoundaryKind
    """What comes next: another batch, a validation, or another epoch."""
    epoch: int
    """Number of the epoch that the last batch belongs to, from 0."""
    num_batches: int
    """Batches done in this epoch."""
    total_batches: int
    """Batches done in all epochs."""
    step: int
    """Optimizer steps done."""
    loaders: list[dict[str, Any]]
    """States of the training loaders, and whether training has `ended` their epoch: with
    `trainer.limit_train_batches` it does so before they do."""
    random: dict[str, Any]
    """Random numbers; kept, since a validation that follows may draw some."""
    is_last_batch: bool
    """Whether the epoch has no other batch."""
    optimization: dict[str, Any]
    """Lightning's counts of optimizer steps, which go on within the next one."""

    @classmethod
    def after_batch(cls, trainer: Trainer) -> "Boundary | None":
        """Return the moment after a training batch, or None inside an accumulation window."""
        fit = trainer.fit_loop
        if fit._should_accumulate():
            return None
        assert fit._data_fetcher is not None
        assert fit._combined_loader is not None
        progress = fit.epoch_loop.batch_progress
        is_epoch_end = fit.epoch_loop._num_ready_batches_reached()
        kind: BoundaryKind = "batch"
        if fit.epoch_loop._should_check_val_fx(fit._data_fetcher):
            kind = "validation"
        elif is_epoch_end:
            kind = "epoch"
        return cls(
            kind=kind,
            epoch=trainer.current_epoch,
            num_batches=progress.current.ready,
            total_batches=progress.total.ready,
            step=trainer.global_step,
            loaders=[
                state | {"ended": is_epoch_end} for state in fit._combined_loader._state_dicts()
            ],
            random=random_state(),
            is_last_batch=progress.is_last_batch,
            optimization=fit.epoch_loop.automatic_optimization.optim_progress.state_dict(),
        )

    def after_validation(self, trainer: Trainer) -> "Boundary":
        """Return the same moment with its validation just done."""
        if self.kind != "validation":
            return self
        is_epoch_end = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        kind: BoundaryKind = "epoch" if is_epoch_end else "batch"
        return dataclasses.replace(self, kind=kind, random=random_state())


def settle_loops(state: dict[str, Any], boundary: Boundary) -> None:
    """Rewrite the state of Lightning's fit loop to one that it resumes from exactly.

    Args:
        state: `FitLoop.state_dict()`, saved at or after the boundary; changed in place.
        boundary: the moment to go on from.
    """
    state["state_dict"]["combined_loader"] = boundary.loaders
    state[_OPTIMIZATION] = copy.deepcopy(boundary.optimization)
    # the step that ended with the last batch is counted by Lightning when it goes on
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = boundary.step - 1
    done, total = boundary.num_batches, boundary.total_batches
    batches: dict[str, Any]
    validation = _progress(_counts(0), _counts(0)) | {"is_last_batch": False}
    epochs = boundary.epoch
    epoch_progress = _progress(
        *[_counts(epochs + 1) | {"processed": epochs, "completed": epochs}] * 2
    )
    match boundary.kind:
        case "batch":
            # as if saved by the last batch's own hook: done, but not yet counted as completed
            batches = _progress(
                _counts(total) | {"completed": total - 1}, _counts(done) | {"completed": done - 1}
            ) | {"is_last_batch": False}
        case "validation":
            # as if stopped in the first batch of the validation, which therefore begins anew
            batches = _progress(_counts(total), _counts(done)) | {
                "is_last_batch": boundary.is_last_batch
            }
            validation["total"] = _counts(1) | {"processed": 0, "completed": 0}
        case "epoch":
            batches = _progress(_counts(total), _counts(0)) | {"is_last_batch": False}
            epoch_progress = _progress(_counts(epochs + 1), _counts(epochs + 1))
            _reset(state["epoch_loop.scheduler_progress"])
            for progress in state[_OPTIMIZATION].values():
                _reset(progress)
    state["epoch_loop.batch_progress"] = batches
    state["epoch_loop.val_loop.batch_progress"] = validation
    state["epoch_progress"] = epoch_progress


def _counts(value: int) -> dict[str, int]:
    return {"ready": value, "started": value, "processed": value, "completed": value}


def _progress(total: dict[str, int], current: dict[str, int]) -> dict[str, Any]:
    return {"total": dict(total), "current": dict(current)}


def _reset(progress: dict[str, Any]) -> None:
    """Set what is counted within an epoch to 0, at whatever depth it stands."""
    for name, value in progress.items():
        if name == "current":
            value.update(dict.fromkeys(value, 0))
        elif isinstance(value, dict):
            _reset(value)


def spread_anew(checkpoint: dict[str, Any], old: Layout, new: Layout, trainer: Trainer) -> None:
    """Rewrite the counts of micro-batches in a checkpoint to those of another layout.

    Args:
        checkpoint: changed in place.
        old: the layout that it was made with.
        new: one with the same rows in a step.
        trainer: knows when validations are due.

    Raises:
        ValueError: this place cannot be one of the new layout; the message says why.
    """
    state = checkpoint["loops"]["fit_loop"]
    loaders = state["state_dict"]["combined_loader"]
    if any(loader.get("handed_out") for loader in loaders):
        raise ValueError(
            f"the checkpoint is between two updates of one rollout, which {old.devices} ranks have "
            f"made ({old}): go on with those until the rollout is over, or start over with --fresh"
        )
    if new.accumulate == old.accumulate:
        return
    if trainer.limit_train_batches not in (None, 1.0):
        raise ValueError(
            f"trainer.limit_train_batches {trainer.limit_train_batches} counts micro-batches, and "
            f"theirs were {old} and are now {new}: keep trainer.accumulate_grad_batches and "
            "batch_size x devices, or set limit_train_batches to null"
        )
    datamodule: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    per_epoch: int = datamodule.num_train_batches
    kind: BoundaryKind = checkpoint["boundary"]
    is_epoch_end = all(loader["ended"] for loader in loaders)
    epoch = state["epoch_progress"]["current"]["completed"] - (kind == "epoch")
    before = state["epoch_loop.batch_progress"]["current"]["ready"]
    done = per_epoch if is_epoch_end else before * new.accumulate // old.accumulate
    total = epoch * per_epoch + done
    if kind == "validation" and not _is_validation_due(trainer, done, total, per_epoch):
        kind = "epoch" if is_epoch_end else "batch"
    checkpoint["boundary"] = kind
    boundary = Boundary(
        kind=kind,
        epoch=epoch,
        num_batches=done,
        total_batches=total,
        step=checkpoint["global_step"],
        loaders=loaders,
        random={},
        is_last_batch=is_epoch_end,
        optimization=state[_OPTIMIZATION],
    )
    settle_loops(state, boundary)


def _is_validation_due(trainer: Trainer, done: int, total: int, per_epoch: int) -> bool:
    """Whether one comes after so many micro-batches of an epoch, as Lightning decides it."""
    interval = trainer.val_check_interval
    if not isinstance(interval, int | float):
        return True  # it is due by the clock
    every = interval if isinstance(interval, int) else int(per_epoch * interval)
    return (total if trainer.check_val_every_n_epoch is None else done) % max(every, 1) == 0


class Resume(Callback):
    """Give a resumed run the random numbers of the run that stopped, at the right moment.

    Making a loader's iterator draws a random number, and a resumed run makes one where the run
    that stopped had it already: so the numbers are restored after that.
    """

    def __init__(self) -> None:
        self._kind: BoundaryKind | None = None
        self._random: dict[str, Any] = {}
        self._loaders: list[dict[str, Any]] = []

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what is to be restored until its moment."""
        if trainer.state.fn == "fit" and "boundary" in checkpoint:
            old = Layout.saved(checkpoint.get("layout"))
            datamodule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            new = Layout.of(trainer, pl_module, datamodule)
            new.refuse_other_rows(old)
            if new != old:
                spread_anew(checkpoint, old, new, trainer)
            self._kind = checkpoint["boundary"]
            for logger in trainer.loggers:
                if isinstance(logger, MetricsFile):
                    logger.rewind(checkpoint["global_step"], self._kind == "validation")
            self._random = random_of_rank(
                checkpoint["random"], trainer.global_rank, checkpoint["global_step"]
            )
            self._loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation that was due comes first."""
        if self._kind == "validation":
            set_random_state(self._random)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the numbers until the iterator of the training loader is made."""
        if self._kind == "validation" and not trainer.sanity_checking:
            self._random = random_state()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch as the run that stopped would have."""
        if self._kind == "epoch":
            fit = trainer.fit_loop
            assert fit._combined_loader is not None
            assert fit._data_fetcher is not None
            # Lightning restores no loader where the last epoch is complete
            fit._combined_loader._load_state_dicts(self._loaders)
            set_random_state(self._random)
            iter(fit._data_fetcher)
        self._end(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Go on within an epoch."""
        if self._kind is not None:
            set_random_state(self._random)
            self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        if self._kind is not None:
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        self._kind = None


def random_state() -> dict[str, Any]:
    """Return the state of every random generator as tensors and numbers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)  # noqa: NPY002
    assert isinstance(keys, numpy.ndarray)
    state = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(keys.astype(numpy.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    python, legacy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = legacy["keys"].numpy().astype(numpy.uint32)
    numpy.random.set_state(  # noqa: NPY002
        (legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["cached"])
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def random_of_rank(states: list[dict[str, Any]], rank: int, step: int) -> dict[str, Any]:
    """Return a rank's own state of all that were saved.

    A rank that is new gets one that follows from the run's seed, the step and its number.
    """
    if rank < len(states):
        return states[rank]
    generator = torch.Generator()
    generator.set_state(states[0]["torch"])
    key = f"{generator.initial_seed()}/{step}/{rank}".encode()
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
    before = random_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    state = random_state()
    set_random_state(before)
    return state


MAY_CHANGE = frozenset(
    {
        "ckpt_path",
        "weights_only",
        "fresh",
        "config",
        "checkpoint",
        "report",
        "trainer.default_root_dir",
        "trainer.max_steps",
        "trainer.max_epochs",
        "trainer.min_steps",
        "trainer.min_epochs",
        "trainer.max_time",
        "trainer.logger",
        "trainer.log_every_n_steps",
        "trainer.enable_progress_bar",
        "trainer.enable_model_summary",
        "trainer.profiler",
        # these are held together by `Layout`
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.strategy",
        "trainer.accumulate_grad_batches",
        "data.init_args.batch_size",
        "data.init_args.num_workers",
        "model.init_args.on_nonfinite",
    }
)
"""Keys that may differ between a run and its continuation: horizon, time limits, logging, and how
the rows of a step are spread."""

_REPORTS = {
    "astrai_train.callbacks.samples.Samples",
    "astrai_train.callbacks.throughput.Throughput",
}

HORIZON = tuple(f"trainer.{name}" for name in ("max_steps", "max_epochs"))


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Describe each setting that a continued run must not change, and does."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key} was {before.get(key)!r} and is now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _may_change(key)
    ]


def _may_change(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:n]) in MAY_CHANGE for n in range(1, len(parts) + 1))


def _flat(config: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key == "trainer.callbacks":
            value = [one for one in value or [] if one["class_path"] not in _REPORTS] or None
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value
