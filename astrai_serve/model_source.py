"""Where the model comes from, in which number format, and whether there is room for it.

All of it is known before a weight is read, so that it can be said, or refused, before memory is
taken.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import get_loader
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.model.adapter import (
    attach_adapter,
    base_of,
    is_adapter_folder,
    read_adapter,
)
from astrai_core.model.auto import parse_config, read_config_json
from astrai_core.model.lora import merge_lora
from astrai_core.model.weights import weight_files

Wish = Literal["auto", "float32", "bfloat16"]

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that is about to be loaded."""

    path: Path
    config: ModelConfig
    is_random: bool
    """The weights are drawn, not read."""
    dtype: torch.dtype
    why: str
    """Why it has this number format."""
    adapter: Path | None = None
    """Folder of a LoRA adapter to merge into the weights."""

    @classmethod
    def find(
        cls, path: Path, wish: Wish, is_random: bool, adapter: Path | None = None
    ) -> "ModelSource":
        """Look at a model folder, or at a YAML file of `ModelConfig` fields.

        Args:
            path: the folder or file; of an adapter folder, its base is found.
            wish: the number format.
            is_random: draw the weights.
            adapter: folder of an adapter over the model at `path`.

        Raises:
            ValueError: a file is missing or wrong; the message says which.
        """
        if is_adapter_folder(path):
            if adapter is not None:
                raise ValueError(
                    f"{path} is an adapter itself; pass its base's folder, or merge it into one "
                    "first (astrai-model merge DIR --out FOLDER)"
                )
            path, adapter = base_of(path), path
        if path.is_file():
            config = _read_yaml(path)
        else:
            config, _ = parse_config(read_config_json(path), path)
        if adapter is not None:
            read_adapter(adapter)  # a bad one is refused before the model is read
        dtype, why = _choose_dtype(path, wish, is_random)
        return cls(
            path=path, config=config, is_random=is_random, dtype=dtype, why=why, adapter=adapter
        )

    @property
    def num_parameters(self) -> int:
        """Numbers the model is made of; a tied matrix counts once."""
        with torch.device("meta"):
            return sum(weight.numel() for weight in Transformer(self.config).parameters())

    def describe(self) -> str:
        """Say what loading will take.

        Raises:
            MemoryError: more than there is.
        """
        count = self.num_parameters
        needed = count * self.dtype.itemsize
        told = f"{amount(count)} parameters, {_size(needed)} in {dtype_name(self.dtype)}"
        if self.dtype is torch.float32:
            told += f" ({_size(needed // 2)} in bfloat16)"
        available = _available_memory()
        if available is None:
            return told
        if needed > available:
            hint = "--dtype bfloat16 halves that" if self.dtype is torch.float32 else "stop others"
            raise MemoryError(f"{self.path}: {told}, but only {_size(available)} are free; {hint}")
        return f"{told}; {_size(available)} of memory are free"

    def load(self) -> Transformer:
        """Read the weights, or draw them, in evaluation mode.

        Raises:
            ValueError: a file is missing or wrong; the message says which.
        """
        if not self.is_random:
            model = AutoModel.from_pretrained(self.path, self.dtype)
            if self.adapter is not None:
                attach_adapter(model, self.adapter, self.path)
                merge_lora(model)
            return model
        with torch.device("meta"):
            model = Transformer(self.config).to(self.dtype)
        model.to_empty(device="cpu").reset_parameters()  # never in two formats at once
        return model.eval()


def dtype_name(dtype: torch.dtype) -> str:
    """A number format as options name it."""
    return str(dtype).removeprefix("torch.")


def amount(count: int) -> str:
    """A large number in three digits."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _read_yaml(file: Path) -> ModelConfig:
    try:
        fields = get_loader("yaml")(file.read_text("utf-8"))
        # in a piece of a training configuration, as those under configs/model are, they lie deeper
        for name in ("model", "init_args", "model"):
            fields = fields.get(name, fields) if isinstance(fields, dict) else None
        if not isinstance(fields, dict):
            raise ValueError(
                "it must hold the fields of ModelConfig, one a line, or under model.init_args.model"
            )
        return ModelConfig.from_dict(fields)
    except (ValueError, YAMLError) as error:
        raise ValueError(f"{file}: {error}") from error


def _choose_dtype(path: Path, wish: Wish, is_random: bool) -> tuple[torch.dtype, str]:
    if wish != "auto":
        return getattr(torch, wish), "as asked for"
    if is_random:
        return torch.float32, "random weights"
    stored = _stored_dtype(path)
    features = torch.cpu.get_capabilities()
    is_native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if stored is torch.float32 or (stored is torch.bfloat16 and is_native):
        return stored, "the folder's own"
    return torch.float32, f"this CPU does not compute in the folder's {dtype_name(stored)}"


def _stored_dtype(folder: Path) -> torch.dtype:
    """Number format of the folder's weights; the first one that is one stands for all."""
    file = weight_files(folder)[0]
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                stored = str(tensors.get_slice(name).get_dtype())
                if stored in _STORED:
                    return _STORED[stored]
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from error
    raise ValueError(f"{file} holds no weights in float32, bfloat16 or float16")


def _available_memory() -> int | None:
    """Bytes that can be had, where the system tells."""
    if not _MEMORY.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
    kilobytes = (lines.get(name, "0").split()[0] for name in ("MemAvailable", "SwapFree"))
    return sum(map(int, kilobytes)) * 1024
