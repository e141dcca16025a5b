"""The model that a run's options describe, before it is made: its shape, and whether it can be.

Making a model that memory cannot hold takes minutes before it fails, or the system kills the
process without a word; its shape tells that at once.
"""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from astrai_core.machine import available_memory
from astrai_core.model import ModelConfig
from astrai_core.model.auto import parse_config, read_config_json
from astrai_core.model.lora import LoRAConfig
from astrai_train.callbacks.checkpoint import FOLDER as CHECKPOINTS
from astrai_train.footprint import adapter_parameters, optimizer_numbers, parameters_by_part
from astrai_train.optim import OptimizerConfig
from astrai_train.wording import memory_size

_FLOAT = 4


class TooLargeError(ValueError):
    """The model cannot be made here; the message says what it takes and what is free."""


def read_shape(options: Namespace) -> ModelConfig:
    """Return the shape of the model that an `LMModule`'s options name.

    Raises:
        ValueError: they name none, or two, or one that cannot be.
    """
    if options.init_from is not None:
        if options.model is not None:
            raise ValueError("model and init_from contradict each other; set one of them to null")
        folder = Path(options.init_from)
        if folder.parent.name == CHECKPOINTS and not folder.exists():
            raise ValueError(
                f"model.init_args.init_from {folder} does not exist: {folder.parent.parent} has no "
                "checkpoint yet; train that run first, or name another model folder"
            )
        return parse_config(read_config_json(folder), folder)[0]
    if options.model is None:
        raise ValueError("there is no model: set model for a new one, or init_from to a folder")
    return ModelConfig.from_dict(options.model.as_dict())


def refuse_long_rows(config: ModelConfig, window_size: int) -> None:
    """Check that the model was made for rows as long as the data's.

    Raises:
        ValueError: it was not.
    """
    if window_size > config.max_len:
        raise ValueError(
            f"data.window_size {window_size} exceeds the model's max_len {config.max_len}: lower "
            "the first, or raise the second where the model is a new one"
        )


def refuse_too_large(config: ModelConfig, options: Namespace, *, is_trained_here: bool) -> int:
    """Check that memory can hold the model, and what training keeps of it whatever the batch.

    Args:
        config: the shape of the model.
        options: those of its `LMModule`.
        is_trained_here: whether gradients and optimizer are in this machine's memory too; else
            weights alone are counted.

    Returns:
        The number of the model's parameters.

    Raises:
        TooLargeError: it cannot.
    """
    numbers = sum(parameters_by_part(config).values())
    needed, what = numbers, "weights"
    if is_trained_here:
        given: Any = options.get("lora")
        lora = LoRAConfig(**given.as_dict()) if given else None
        trained = adapter_parameters(config, lora) if lora else numbers
        optimizer = OptimizerConfig(**options.optimizer.as_dict())
        needed += trained + optimizer_numbers(config, optimizer, lora)
        what = "weights, gradients and optimizer"
    available = available_memory()
    if available is not None and _FLOAT * needed > available:
        raise TooLargeError(
            f"the model does not fit into memory: {what} of its {numbers:,} parameters take "
            f"{memory_size(_FLOAT * needed)}, but {memory_size(available)} are free; make it "
            "smaller (dim, n_layers, vocab_size); astrai-train plan tells what fits"
        )
    return numbers


def computes_here(accelerator: object) -> bool:
    """Whether `trainer.accelerator` means this machine's processor."""
    return accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
