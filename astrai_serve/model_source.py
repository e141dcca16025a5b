"""Where the model comes from, in which number format, and whether there is room for it.

All of it is known before a weight is read, so that it can be said, or refused, before memory is
taken.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import get_loader
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from astrai_core.machine import available_memory
from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.model.adapter import (
    attach_adapter,
    base_of,
    is_adapter_folder,
    read_adapter,
)
from astrai_core.model.allocator import large_blocks_returned
from astrai_core.model.auto import parse_config, read_config_json
from astrai_core.model.fusion import fuse_
from astrai_core.model.inference import read_fused
from astrai_core.model.lora import merge_lora
from astrai_core.model.quantization import Scheme, described_scheme, quantize_
from astrai_core.model.weights import weight_files

Wish = Literal["auto", "float32", "bfloat16"]
Weights = Literal["auto", "fp32", "bf16", "w8a8", "int8", "int4"]

_DTYPES: dict[str, Wish] = {"fp32": "float32", "bf16": "bfloat16"}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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
    scheme: Scheme | None = None
    """How the weights are quantised."""

    @classmethod
    def find(
        cls,
        path: Path,
        wish: Wish,
        is_random: bool,
        adapter: Path | None = None,
        weights: Weights = "auto",
    ) -> "ModelSource":
        """Look at a model folder, or at a YAML file of `ModelConfig` fields.

        Args:
            path: the folder or file; of an adapter folder, its base is found.
            wish: the number format.
            is_random: draw the weights.
            adapter: folder of an adapter over the model at `path`.
            weights: quantise them by a scheme, or refuse those that are; auto takes them as they
                are.

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
        stored = None
        if path.is_file():
            config = _read_yaml(path)
        else:
            content = read_config_json(path)
            config, _ = parse_config(content, path)
            stored = None if is_random else described_scheme(content)
        scheme = _choose_scheme(path, stored, weights, adapter)
        if adapter is not None:
            read_adapter(adapter)  # a bad one is refused before the model is read
        if weights in _DTYPES:
            wish = _DTYPES[weights]
        dtype, why = _choose_dtype(path, wish, is_random)
        return cls(
            path=path,
            config=config,
            is_random=is_random,
            dtype=dtype,
            why=why,
            adapter=adapter,
            scheme=scheme,
        )

    @property
    def num_parameters(self) -> int:
        """Numbers the model is made of; a tied matrix counts once."""
        return self._sizes[0]

    def describe(self) -> str:
        """Say what loading will take.

        Raises:
            MemoryError: more than there is.
        """
        num_parameters, needed = self._sizes
        kind = dtype_name(self.dtype) if self.scheme is None else f"{self.scheme} weights"
        told = f"{amount(num_parameters)} parameters, {_size(needed)} in {kind}"
        if self.dtype is torch.float32 and self.scheme is None:
            told += f" ({_size(needed // 2)} in bfloat16)"
        available = available_memory()
        if available is None:
            return told
        if needed > available:
            can_shrink = self.dtype is torch.float32 and self.scheme is None
            hint = "--dtype bfloat16 halves that" if can_shrink else "stop others"
            raise MemoryError(f"{self.path}: {told}, but only {_size(available)} are free; {hint}")
        return f"{told}; {_size(available)} of memory are free"

    def load(self) -> Transformer:
        """Read the weights, or draw them, in evaluation mode, in as few operators as can be.

        Raises:
            ValueError: a file is missing or wrong; the message says which.
        """
        if not self.is_random and self.adapter is None:
            return read_fused(self.path, self.dtype, self.scheme)
        with large_blocks_returned():
            return fuse_(self._made())

    def _made(self) -> Transformer:
        """A model that is not in one folder as it will be."""
        if self.adapter is not None:
            model = AutoModel.from_pretrained(self.path, self.dtype)
            attach_adapter(model, self.adapter, self.path)
            merge_lora(model)
        else:
            with torch.device("meta"):
                model = Transformer(self.config).to(self.dtype)
            model.to_empty(device="cpu").reset_parameters()  # never in two formats at once
        if self.scheme is not None:
            quantize_(model, self.scheme)
        return model.eval()

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """Numbers the model is made of, and the memory of its weights as they will lie there."""
        with torch.device("meta"):
            model = Transformer(self.config).to(self.dtype)
            num_parameters = sum(weight.numel() for weight in model.parameters())
            if self.scheme is not None:
                quantize_(model, self.scheme)
        num_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        return num_parameters, num_bytes


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


def _choose_scheme(
    path: Path, stored: Scheme | None, weights: Weights, adapter: Path | None
) -> Scheme | None:
    if stored is None:
        return None if weights in ("auto", "fp32", "bf16") else weights
    if weights not in ("auto", stored):
        raise ValueError(
            f"--weights {weights}: {path} holds {stored} weights, and the numbers they were "
            "rounded from are not there; pass the folder it was made from"
        )
    if adapter is not None:
        raise ValueError(
            f"{path} holds {stored} weights, which no adapter can be merged into; pass the folder "
            f"it was made from, with --weights {stored}"
        )
    return stored


def _stored_dtype(folder: Path) -> torch.dtype:
    """Number format of the folder's weights; the first one that is one stands for all."""
    file = weight_files(folder)[0]
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                stored = str(tensors.get_slice(name).get_dtype())
                if stored in _STORED and not name.endswith("_scale"):
                    return _STORED[stored]
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from error
    raise ValueError(f"{file} holds no weights in float32, bfloat16 or float16")
