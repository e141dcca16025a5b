"""`astrai-train plan`: what a run will take of this machine, before it begins."""

import logging
import os
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace

from astrai_core.machine import available_memory
from astrai_core.model import ModelConfig
from astrai_core.model.lora import LoRAConfig
from astrai_train.footprint import (
    Footprint,
    activated_parameters,
    adapter_parameters,
    parameters_by_part,
)
from astrai_train.losses.policy import PolicyConfig
from astrai_train.optim import OptimizerConfig
from astrai_train.option_errors import explain
from astrai_train.probe import seconds_per_step
from astrai_train.run import Run
from astrai_train.schedules import count_steps
from astrai_train.shape import read_shape, refuse_long_rows
from astrai_train.wording import memory_size

_PROGRAM = "astrai-train plan"
# Python, torch and Lightning, before there is a model
_PROCESS = 600_000_000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides about a run's memory and time."""

    config: ModelConfig
    optimizer: OptimizerConfig
    rows: int
    """Rows of a micro-batch."""
    length: int
    """Tokens of a row."""
    accumulate: int
    """Micro-batches of a step."""
    devices: int
    steps: int | None
    """Optimizer steps of the run, where that is known."""
    lora: LoRAConfig | None = None
    """What is trained; None is the whole model."""
    precision: str = "32-true"
    """The trainer's."""
    frozen: int = 0
    """Models that are kept beside the one that is trained."""

    @property
    def beside(self) -> int:
        """Bytes of the models that are not trained."""
        return self.frozen * 4 * sum(parameters_by_part(self.config).values())

    def footprint(self, rows: int) -> Footprint:
        """What training holds with micro-batches of so many rows."""
        is_mixed = self.precision == "bf16-mixed"
        return Footprint.of(
            self.config, rows, self.length, self.lora, self.optimizer, is_mixed=is_mixed
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step on all devices."""
        return self.rows * self.length * self.accumulate * self.devices

    def needed(self, rows: int) -> int:
        """Bytes of one process with micro-batches of so many rows."""
        return self.footprint(rows).total + self.beside + _PROCESS


def main(arguments: Sequence[str]) -> None:
    """Print the plan of a configuration and exit with 1 where it does not fit.

    Args:
        arguments: options of `astrai-train fit`. Without a data section the rows are as long and
            as many as the data module's defaults.
    """
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # it tells the seed
    try:
        plan = read_plan(arguments)
        _say(describe_size(plan))
        _say(describe_memory(plan, available_memory()))
        _say(describe_time(plan))
    except ArgumentError as error:
        _fail(explain(str(error)), 2)
    except ValueError as error:
        _fail(explain(str(error)), 2)
    except (MemoryError, OSError) as error:
        _fail(str(error), 1)


def read_plan(arguments: Sequence[str]) -> Plan:
    """Read what a run's options say.

    Raises:
        ArgumentError: an option is unknown or wrong.
        ValueError: the options contradict each other.
    """
    settings = _Settings(["fit", *_with_defaults(arguments)]).settings
    model, data, trainer = settings.model.init_args, settings.data.init_args, settings.trainer
    devices = trainer.devices if isinstance(trainer.devices, int) else 1
    total = model.schedule.total_steps
    steps = total or count_steps(
        max_steps=trainer.max_steps,
        max_epochs=trainer.max_epochs,
        num_batches=_count_batches(settings) if trainer.max_steps < 1 else None,
        accumulate=trainer.accumulate_grad_batches,
    )
    config = read_shape(model)
    refuse_long_rows(config, data.window_size)
    return Plan(
        config=config,
        optimizer=OptimizerConfig(**model.optimizer.as_dict()),
        rows=data.batch_size,
        length=data.window_size,
        accumulate=trainer.accumulate_grad_batches,
        devices=max(1, devices),
        steps=steps,
        lora=LoRAConfig(**model.lora.as_dict()) if model.lora else None,
        precision=str(trainer.precision or "32-true"),
        frozen=_count_frozen(model),
    )


def describe_size(plan: Plan) -> str:
    """The parameters, by part."""
    parts = parameters_by_part(plan.config)
    lines = [("parameters", sum(parts.values())), *parts.items()]
    if plan.config.ffn_type == "moe":
        lines.append(("met by a token", activated_parameters(plan.config)))
    if plan.lora is not None:
        lines.append(("in adapters", adapter_parameters(plan.config, plan.lora)))
    return "\n".join(_row(name, f"{count:,}", name == "parameters") for name, count in lines)


def describe_memory(plan: Plan, available: int | None) -> str:
    """The memory, by part, and whether that much is free.

    Raises:
        MemoryError: it is not; the message says what would fit.
    """
    footprint = plan.footprint(plan.rows)
    needed = plan.needed(plan.rows)
    shape = f"{plan.rows} rows of {plan.length} tokens"
    lines = [
        _row("memory", memory_size(needed), True),
        _row("weights", memory_size(footprint.weights)),
        _row("gradients", memory_size(footprint.gradients)),
        _row("optimizer", memory_size(footprint.optimizer)),
        _row("activations", memory_size(footprint.activations), note=f"{shape}, at most"),
        _row("loss", memory_size(footprint.loss)),
        *(
            [_row("not trained", memory_size(plan.beside), note="reference, engine")]
            if plan.beside
            else []
        ),
        _row("process", memory_size(_PROCESS)),
    ]
    if available is None:
        return "\n".join(lines)
    together = needed * plan.devices
    if together > available:
        raise MemoryError(_refusal(plan, footprint, together, available))
    return "\n".join([*lines, _row("free memory", memory_size(available), True, note="it fits")])


def describe_time(plan: Plan) -> str:
    """The speed of a short probe, and how long the run will take at it."""
    seconds = seconds_per_step(
        plan.config,
        plan.rows,
        plan.length,
        plan.accumulate,
        plan.optimizer,
        plan.lora,
        plan.precision,
    )
    # processes on one machine share its cores, so more devices are no faster here
    rate = plan.tokens_per_step / plan.devices / seconds
    threads = f"threads: {torch.get_num_threads()}, {plan.precision}, uncompiled"
    lines = [
        _row("precision", suggested_precision(), True, note="trainer.precision that suits here"),
        _row("speed", f"{_figures(rate)} tokens/s", True, note=threads),
    ]
    step = f"{plan.rows} rows x {plan.length} x {plan.accumulate} micro-batches"
    step += f" x {plan.devices} devices" if plan.devices > 1 else ""
    lines.append(_row("optimizer step", f"{plan.tokens_per_step:,} tokens", note=step))
    if plan.steps is None:
        return "\n".join([*lines, _row("duration", "unknown: the data is not there yet", True)])
    tokens = plan.steps * plan.tokens_per_step
    note = f"{plan.steps:,} steps, {_figures(tokens)} tokens, without validation"
    return "\n".join([*lines, _row("duration", _duration(tokens / rate), True, note=note)])


def suggested_precision() -> str:
    """The `trainer.precision` that is fastest here; weights are float32 with either."""
    flags = torch.cpu.get_capabilities()
    native = any(flags.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16-mixed" if native or torch.cuda.is_available() else "32-true"


class _Settings(Run):
    """The options of a run, read and checked, with nothing built."""

    def before_instantiate_classes(self) -> None:
        """Leave earlier runs alone."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def _with_defaults(arguments: Sequence[str]) -> list[str]:
    """Put class names before options that bring none, as a piece under configs/ does."""
    pieces: list[Any] = [yaml.safe_load(f.read_text("utf-8")) for f in _config_files(arguments)]
    names = {argument.partition("=")[0] for argument in arguments}
    named = {
        section
        for section in ("model", "data")
        if names & {f"--{section}", f"--{section}.class_path"}
        or any("class_path" in (piece.get(section) or {}) for piece in pieces)
    }
    defaults = [] if "model" in named else ["--model=SEQModule"]
    if "data" not in named:
        # only the shape of a batch is read, so the files need not be there
        defaults += ["--data=TokenDataModule"]
        defaults += ["--data.init_args.tokenizer=none", "--data.init_args.train=none"]
    return [*defaults, *arguments]


def _config_files(arguments: Sequence[str]) -> list[Path]:
    files = []
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            files.append(Path(value if equals else arguments[position + 1]))
    return files


def _count_frozen(model: Namespace) -> int:
    """Models that GRPO keeps: the first one as a reference, and the copy that its engine runs.

    An adapted model is its own reference. The cache of the engine comes on top and is a matter of
    how long answers become.
    """
    policy = getattr(model, "policy", None)
    if policy is None:
        return 0
    has_reference = PolicyConfig(**policy.as_dict()).needs_reference and not model.lora
    return int(has_reference) + int(model.engine is not None)


def _count_batches(settings: Namespace) -> int | None:
    """Micro-batches of an epoch, where the data is there."""
    from astrai_train.data.module import TokenDataModule

    options = settings.data.init_args.as_dict()
    files = options["train"] if isinstance(options["train"], list) else [options["train"]]
    if not all(
        Path(file).is_file() for file in (*files, Path(options["tokenizer"]) / "tokenizer.json")
    ):
        return None
    return TokenDataModule(**options).num_train_batches


def _refusal(plan: Plan, footprint: Footprint, together: int, available: int) -> str:
    standing = together - footprint.activations * plan.devices
    told = f"the run needs {memory_size(together)}, but {memory_size(available)} are free"
    rows = plan.rows
    while rows > 1 and plan.needed(rows) * plan.devices > available:
        rows -= 1
    if plan.needed(rows) * plan.devices <= available:
        windows = -(-plan.rows * plan.accumulate // rows)
        return (
            f"{told}: set data.batch_size to {rows} and trainer.accumulate_grad_batches to "
            f"{windows}, which learns the same"
        )
    if standing > available:
        return (
            f"{told}, and weights, gradients and optimizer alone take {memory_size(standing)}: "
            "this machine cannot train the model; choose a smaller dim or fewer n_layers"
        )
    return f"{told}, even with one row: lower data.window_size {plan.length}"


def _row(name: str, value: str, is_head: bool = False, note: str = "") -> str:
    name = name if is_head else f"  {name}"
    return f"{name:<18}{value:>18}" + (f"   {note}" if note else "")


def _figures(value: float) -> str:
    """Three figures, which is more than a probe knows."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    digits = max(0, len(str(int(value))) - 3)
    return f"{round(value, -digits):,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    for size, name in ((86_400 * 365, "years"), (86_400, "days"), (3_600, "hours"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.0f} s"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _fail(message: str, status: int) -> NoReturn:
    if os.environ.get("ASTRAI_DEBUG"):
        raise
    sys.stderr.write(f"{_PROGRAM}: {' '.join(message.split())}\n")
    sys.exit(status)
