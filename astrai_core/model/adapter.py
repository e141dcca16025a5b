"""Adapter folders: small matrices that say over which model folder they were trained.

    adapter_config.json  adapter_model.safetensors  [tokenizer.json ...]  [trainer/]

The format is PEFT's own. Ours carries one thing more, in the header of the tensors: a digest of the
base's weights, so that a base that has changed since is noticed.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from astrai_core.interop import peft
from astrai_core.model.config import read_json
from astrai_core.model.lora import (
    Adapter,
    LoRAConfig,
    add_lora,
    linear_layers,
    lora_layers,
)
from astrai_core.model.transformer import Transformer
from astrai_core.model.weights import read_tensors, weight_files, write_tensors

_log = logging.getLogger(__name__)

_DIGEST = "base_sha256"


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / peft.CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> Path:
    """The model folder over which an adapter was trained, as the adapter tells it.

    Raises:
        ValueError: it tells none, or there is none; the message says what to pass instead.
    """
    named = read_json(folder / peft.CONFIG).get(peft.BASE)
    if not isinstance(named, str) or not named:
        raise ValueError(
            f"{folder / peft.CONFIG} names no base; pass its folder as --model, and "
            f"--adapter {folder}"
        )
    if not Path(named).is_dir():
        raise ValueError(
            f"{folder} is an adapter over {named}, which is not a folder on this disk; pass the "
            f"folder where it is now as --model, and --adapter {folder}"
        )
    if is_adapter_folder(Path(named)):
        raise ValueError(
            f"{folder} is an adapter over the adapter {named}; merge that one into a model folder "
            "first (astrai-model merge DIR --out FOLDER)"
        )
    return Path(named)


def adapt(model: Transformer, config: LoRAConfig, base: Path) -> None:
    """Give a model that was loaded from the folder `base` new adapters, in place.

    Raises:
        ValueError: a target is no layer of the model.
    """
    add_lora(model, config)
    model.adapter = Adapter(config=config, base=base.resolve(), base_digest=digest(base))


def attach_adapter(model: Transformer, folder: Path, base: Path) -> None:
    """Put an adapter folder's matrices around the layers of a model, in place.

    Args:
        model: loaded from `base`.
        folder: ours or PEFT's.
        base: where it is not the folder that the adapter itself names, its weights may differ from
            those that the adapter was trained on (in another number format, say), with a warning.

    Raises:
        ValueError: a file is missing or damaged, a setting is not supported, or the adapter
            belongs to another model; the message says which.
    """
    adapter, tensors = read_adapter(folder)
    unknown = sorted(_layers(tensors) - linear_layers(model).keys())
    if unknown:
        raise ValueError(
            f"{folder} adapts {unknown[0]}, which the base {base} does not have: it is the adapter "
            "of another model"
        )
    add_lora(model, adapter.config)
    wanted = adapter_state(model)
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{folder / peft.WEIGHTS} lacks {peft.to_disk_name(missing[0])}")
    for name, parameter in wanted.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{folder} does not fit {base}: {name} has shape {tuple(tensor.shape)}, the base "
                f"asks {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(tensor)
    found = digest(base)
    if adapter.base_digest not in (None, found):
        changed = f"the weights of {base} are not those that {folder} was trained on"
        if adapter.base is None or base.resolve() == adapter.base.resolve():
            raise ValueError(
                f"{changed}: they have changed since; to use them all the same, pass a copy of "
                f"that folder as --model, and --adapter {folder}"
            )
        _log.warning(changed)
    model.adapter = Adapter(config=adapter.config, base=base.resolve(), base_digest=found)


def read_adapter(folder: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """Read an adapter folder: what it is, and its matrices under our names.

    Raises:
        ValueError: a file is missing or damaged, or a setting or a tensor is not supported.
    """
    for name in (peft.CONFIG, peft.WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: it is not an adapter folder, or not whole")
    content = read_json(folder / peft.CONFIG)
    try:
        options = peft.to_options(content)
        tensors = {peft.from_disk_name(n): t for n, t in read_tensors(folder / peft.WEIGHTS)}
        targets = sorted(_layers(tensors))
        config = LoRAConfig(targets=targets, **options)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: {error}") from error
    named = content.get(peft.BASE)
    base = Path(named) if isinstance(named, str) and named else None
    with safe_open(folder / peft.WEIGHTS, framework="pt") as file:
        base_digest = (file.metadata() or {}).get(_DIGEST)
    return Adapter(config=config, base=base, base_digest=base_digest), tensors


def write_adapter(folder: Path, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Write an adapter, its matrices given under our names, into an existing folder."""
    named = {peft.to_disk_name(name): tensor for name, tensor in state.items()}
    metadata = {_DIGEST: adapter.base_digest} if adapter.base_digest else {}
    write_tensors(folder / peft.WEIGHTS, named, metadata)
    options = {key: getattr(adapter.config, key) for key in peft.OPTIONS}
    targets = sorted(peft.to_target(name) for name in _layers(state))
    config = peft.to_config(options, targets, str(adapter.base or ""))
    (folder / peft.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapter_state(model: Transformer) -> dict[str, Tensor]:
    """The matrices of a model's adapters by name."""
    return {
        f"{name}.{matrix}": parameter
        for name, layer in lora_layers(model).items()
        for matrix, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
    }


def digest(folder: Path) -> str:
    """SHA-256 over the weights of a model folder, in whatever files they are."""
    hashes = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            hashes.update(hashlib.file_digest(file, "sha256").digest())
    return hashes.hexdigest()


def _layers(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}
