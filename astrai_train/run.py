"""A training run: LightningCLI with checkpoint folders, exact resume and signals built in.

A run lives in one folder, `trainer.default_root_dir`:

    config.yaml     the whole configuration; `astrai-train fit --config` takes it
    metrics.csv     what was logged
    checkpoints/    model folders and `last`
    finished.json   there once the run is complete
    report.html     the run as a page; report.json has its figures
"""

import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import LambdaCallback, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from astrai_core.atomic_folder import read_last
from astrai_core.checkpoint import load_entry
from astrai_train.callbacks.checkpoint import (
    FOLDER,
    STATE,
    FolderCheckpoint,
    FolderCheckpointIO,
)
from astrai_train.callbacks.layout import Layout
from astrai_train.callbacks.memory import FreeMemory
from astrai_train.callbacks.predictions import PREDICTIONS, Predictions
from astrai_train.callbacks.preemption import Preemption
from astrai_train.callbacks.progress import progress
from astrai_train.callbacks.resume import HORIZON, Resume, changed_keys
from astrai_train.callbacks.samples import Samples
from astrai_train.callbacks.throughput import Throughput
from astrai_train.data.module import TokenDataModule
from astrai_train.metrics_file import MetricsFile
from astrai_train.modules import DPOModule, GRPOModule, SEQModule, SFTModule
from astrai_train.modules.base import LMModule
from astrai_train.named_checkpoint import (
    refuse_no_checkpoint,
    refuse_other_architecture,
    refuse_other_objective,
)
from astrai_train.report import write_report
from astrai_train.report.history import CONFIG, FINISHED, METRICS, SAMPLES
from astrai_train.report.page import FIGURES, REPORT
from astrai_train.shape import computes_here, read_shape, refuse_long_rows, refuse_too_large
from astrai_train.tensorboard import go_on

_ASIDE = "earlier"
# parameters of a model that takes seconds to make
_LARGE = 200_000_000
_FILES = (FOLDER, CONFIG, METRICS, FINISHED, SAMPLES, REPORT, FIGURES)
SHORT_NAMES = (DPOModule, SEQModule, SFTModule, GRPOModule, TokenDataModule, Samples, Throughput)
"""Classes that a configuration names without their module: importing them makes it possible."""


class FinishedError(Exception):
    """The run that is asked for is complete; the message says where it is."""


class Run(LightningCLI):
    """One command of `astrai-train`, from its arguments to its end.

    Args:
        arguments: command and options, as on the command line.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._command = arguments[0]
        self._resumed: Path | None = None
        self._has_begun = False
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        options = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=42,
            trainer_defaults={
                "default_root_dir": "runs/train",
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 10,
                "gradient_clip_val": 1.0,
                "enable_model_summary": False,
            },
            parser_kwargs={
                "prog": "astrai-train",
                **options,
                **{name: dict(options) for name in self.subcommands()},
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(arguments),
        )

    def execute(self) -> None:
        """Do what the command says, with the classes that are built by now."""
        assert self.subcommand is not None
        super()._run_subcommand(self.subcommand)

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave the run to `execute`: a wrong option and a failed run are told apart."""

    @property
    def stopped_by(self) -> int | None:
        """Number of the signal that the run has received."""
        return self.preemption.received

    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the one command that was given: parsers of all four take seconds to build."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options beside those of trainer, model and data."""
        parser.add_lightning_class_args(FolderCheckpoint, "checkpoint")
        parser.add_argument(
            "--fresh",
            type=bool,
            default=False,
            help="Put an earlier run of the same folder aside and start at step 0.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without Lightning's warning about arguments that do not come from `sys.argv`."""
        self.config = parser.parse_args(args)

    @property
    def settings(self) -> Namespace:
        """The configuration of this command."""
        return self.config[self.config.subcommand]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.settings.trainer.default_root_dir or ".")

    @property
    def last(self) -> Path | None:
        """The newest checkpoint of the run."""
        return read_last(self.folder / FOLDER)

    def _set_seed(self) -> None:
        """Seed, with a number that a continued run has too."""
        seed = self.settings.seed_everything
        if isinstance(seed, bool):
            raise ValueError(
                f"seed_everything must be a whole number, so that the run can resume, not {seed}"
            )
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Refuse what needs no model to be refused."""
        if self.settings.trainer.enable_checkpointing is False:
            raise ValueError(
                "trainer.enable_checkpointing must not be false: a run always ends in a "
                "checkpoint; checkpoint.every_n_steps and checkpoint.every_minutes say when else"
            )
        self.plain_config = self._plain_config()
        if self._continues and self.last is not None:
            self._refuse_changes(self.last)
            self._refuse_finished(self.last)
        named = self.settings.ckpt_path
        if named:
            refuse_no_checkpoint(Path(named))
            if self.subcommand == "fit":
                refuse_other_objective(Path(named), self.settings.model.class_path)
        kind = locate(self.settings.model.class_path)
        if inspect.isclass(kind) and issubclass(kind, LMModule):
            self._check_shape(self.settings.model.init_args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with everything that a run of ours has."""
        given = self._get(self.config_init, "trainer")
        checkpoint = self._get(self.config_init, "checkpoint")
        limit = None if given.max_time is None else Timer(given.max_time).time_remaining()
        self.preemption = Preemption(checkpoint, limit)
        begin = LambdaCallback(on_fit_start=lambda *_: self._begin())
        callbacks = [begin, *_listed(given.callbacks), Resume(), self.preemption, FreeMemory()]
        if self.subcommand == "predict":
            callbacks.append(Predictions())
        if given.enable_progress_bar is not False and not given.barebones:
            callbacks.append(progress(given.log_every_n_steps))
        logger = given.logger
        if logger is not False:
            own = [MetricsFile(self.folder)] if self.subcommand == "fit" else []
            logger = own + [one for one in _listed(logger) if one is not True]
        trainer = super().instantiate_trainer(
            callbacks=callbacks,
            logger=logger,
            max_time=None,
            plugins=[*_listed(given.plugins), FolderCheckpointIO(self.model)],
            **kwargs,
        )
        _refuse_forked_ranks(trainer, given.strategy)
        if self._continues and self.last is not None:
            layout = Layout.of(trainer, self.model, self.datamodule)
            layout.refuse_other_rows(Layout.saved(load_entry(self.last / STATE, "layout")))
            step: Any = load_entry(self.last / STATE, "global_step")
            for one in trainer.loggers:
                if isinstance(one, TensorBoardLogger):
                    go_on(one, step)
        return trainer

    def fit(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        **options: Any,
    ) -> None:
        """Train, from the last checkpoint where there is one."""
        self._resumed = Path(ckpt_path) if ckpt_path else self.last if self._continues else None
        try:
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=self._resumed, **options)
        except BaseException as error:
            self._report(str(error) or type(error).__name__)
            raise
        if not self._is_dry and self.trainer.is_global_zero:
            self._end()

    def validate(self, **options: Any) -> None:
        """Measure the run's last checkpoint on the validation data."""
        self.trainer.validate(**self._with_weights(options))

    def test(self, **options: Any) -> None:
        """Measure the run's last checkpoint on the test data."""
        self.trainer.test(**self._with_weights(options))

    def predict(self, **options: Any) -> None:
        """Score the prediction data by the run's last checkpoint, a line for each sample."""
        self.trainer.predict(**self._with_weights(options | {"return_predictions": False}))
        _say(f"predictions: {self.folder / PREDICTIONS}")

    @property
    def _is_run(self) -> bool:
        """Whether this trains in the run's folder, from its own checkpoint or from the start."""
        return self.subcommand == "fit" and not self.settings.ckpt_path and not self._is_dry

    @property
    def _continues(self) -> bool:
        return self._is_run and not self.settings.fresh

    def _parse_ckpt_path(self) -> None:
        """Take no hyperparameters from a checkpoint: Lightning would read them by pickle."""

    @property
    def _is_dry(self) -> bool:
        return bool(self.settings.trainer.fast_dev_run)

    def _plain_config(self) -> dict[str, Any]:
        text = self.parser.dump(self.config, skip_link_targets=False, skip_none=False)
        config: dict[str, Any] = yaml.safe_load(text)[self.subcommand]
        config.pop("config", None)
        return config

    def _refuse_changes(self, last: Path) -> None:
        file = self.folder / CONFIG
        if not file.is_file():
            raise ValueError(
                f"{self.folder} holds checkpoints but no {CONFIG}, so that nobody can say whether "
                f"{last.name} belongs to this configuration; choose another "
                "trainer.default_root_dir, or start over with --fresh"
            )
        changed = changed_keys(yaml.safe_load(file.read_text("utf-8")), self.plain_config)
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other settings: {'; '.join(changed)}. Change them "
                "back, choose another trainer.default_root_dir, or start over with --fresh"
            )

    def _refuse_finished(self, last: Path) -> None:
        file = self.folder / FINISHED
        if file.is_file():
            finished = json.loads(file.read_text("utf-8"))
            if finished == {"checkpoint": last.name, "horizon": self._horizon()}:
                raise FinishedError(
                    f"the run in {self.folder} is finished: {last} is its model folder. To train "
                    "on, raise trainer.max_steps or trainer.max_epochs; to start over, use --fresh"
                )

    def _horizon(self) -> dict[str, Any]:
        trainer = self.plain_config["trainer"]
        return {key: trainer[key.removeprefix("trainer.")] for key in HORIZON}

    def _check_shape(self, options: Namespace) -> None:
        """Refuse what a look at the model's shape tells, and say what takes a while."""
        config = read_shape(options)
        if self.settings.ckpt_path:
            refuse_other_architecture(Path(self.settings.ckpt_path), config)
        window_size = self.settings.get("data.init_args.window_size")
        if window_size is not None:
            refuse_long_rows(config, window_size)
        is_trained_here = self.subcommand == "fit" and computes_here(
            self.settings.trainer.accelerator
        )
        numbers = refuse_too_large(config, options, is_trained_here=is_trained_here)
        if numbers >= _LARGE:
            how = "read" if options.init_from else "made"
            _say(f"a model of {numbers:,} parameters is {how}, which takes a while")

    def _begin(self) -> None:
        """Take the folder: options, data and checkpoint are in order, the first step comes next."""
        resumed = self._resumed
        if self._is_dry or not self.trainer.is_global_zero:
            return
        self._has_begun = True
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.settings.fresh and self._is_run:
            _put_aside(self.folder)
        header = "# The whole configuration of this run.\n"
        text = header + yaml.safe_dump(self.plain_config, sort_keys=False, allow_unicode=True)
        (self.folder / CONFIG).write_text(text, encoding="utf-8")
        for logger in self.trainer.loggers:
            if resumed is None and isinstance(logger, MetricsFile):
                logger.begin_anew()
        total = sum(weight.numel() for weight in self.model.parameters())
        trained = sum(w.numel() for w in self.model.parameters() if w.requires_grad)
        told = f"{total:,} parameters" + (f", {trained:,} of them trained" * (trained < total))
        start = f"goes on from {resumed}" if resumed else "starts"
        _say(f"{type(self.model).__name__}, {told}, in {self.folder}: {start}")

    def _end(self) -> None:
        last = self.last
        if last is None:
            _say("nothing was trained: the horizon is 0 steps")
            return
        content = json.dumps({"checkpoint": last.name, "horizon": self._horizon()})
        temporary = self.folder / f".{FINISHED}"
        temporary.write_text(content + "\n", encoding="utf-8")
        temporary.replace(self.folder / FINISHED)
        self._report()
        served = f"astrai-serve --model {self.folder}/{FOLDER}/last"
        _say(f"finished after {self.trainer.global_step} steps; serve it: {served}")

    def _report(self, stopped: str | None = None) -> None:
        """Write the run's report; that it cannot be written is said and ends nothing."""
        if not self._has_begun:
            return
        try:
            page = write_report(self.folder, stopped)
        except (OSError, ValueError) as error:
            _say(f"there is no report of the run: {error}")
        else:
            _say(f"report: {page}")

    def _with_weights(self, options: dict[str, Any]) -> dict[str, Any]:
        path = options.get("ckpt_path") or self.last
        if path is None:
            _say(f"{self.folder} has no checkpoint: the weights are those that `model` begins with")
        else:
            _say(f"weights of {path}")
        return options | {"ckpt_path": path}


def _refuse_forked_ranks(trainer: Trainer, strategy: Any) -> None:
    """Want each rank to be a command of its own.

    Where the first process only waits for the ranks, it has no weights to hand back but by pickle,
    writes the report of a run that it has not seen, and takes the signals that are meant for them.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise ValueError(
            f"trainer.strategy {name} starts ranks as a notebook must, from a process that only "
            "waits for them: signals do not reach them, and the run could not be saved; set "
            "trainer.strategy to ddp"
        )


@rank_zero_only
def _put_aside(folder: Path) -> None:
    """Move what an earlier run left into a folder beside, whose number is free."""
    names = [name for name in _FILES if (folder / name).exists()]
    if not names:
        return
    number = 1
    while (folder / f"{_ASIDE}-{number}").exists():
        number += 1
    aside = folder / f"{_ASIDE}-{number}"
    aside.mkdir()
    for name in names:
        (folder / name).rename(aside / name)
    _say(f"the earlier run is in {aside} now")


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


@rank_zero_only
def _say(text: str) -> None:
    sys.stdout.write(f"astrai-train: {text}\n")
    sys.stdout.flush()
