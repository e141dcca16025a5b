"""Weights in a folder: safetensors, whole or in shards. Nothing is unpickled.

A tensor that is missing, left over or of another shape is an error by name; a model never keeps a
random weight where the folder had none.
"""

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from astrai_core.model.config import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        ValueError: there are none, the index is not one, or a shard of it is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX} has no weight_map of tensors to files")
        shards = sorted(set(map(str, weight_map.values())))
        for shard in shards:
            if Path(shard).name != shard:
                raise ValueError(f"{folder / INDEX} names {shard!r}, which is not in the folder")
            if not (folder / shard).is_file():
                raise ValueError(f"{folder} lacks the shard {shard} that {INDEX} names")
        return [folder / shard for shard in shards]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ValueError(
            f"{folder} holds pickled weights (.bin or .pt), which are never loaded: a pickle can "
            "run any code; take the safetensors or, if you trust the file, let transformers "
            "make them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    raise ValueError(f"{folder} has no {WEIGHTS}: it is not a model folder, or not a whole one")


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of one safetensors file, each in memory of its own.

    Raises:
        ValueError: the file is truncated or not safetensors.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            # mapped anew for each: the pages read of one mapping would all count as memory at last
            with safe_open(file, framework="pt") as tensors:
                tensor = tensors.get_tensor(name).clone()
            yield name, tensor
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from error


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file, with texts to remember in its header.

    Raises:
        OSError: the disk is full or not writable.
    """
    packed = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        save_file(packed, file, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
        raise OSError(f"cannot write {file}: {error}") from error


def assign_weights(
    module: torch.nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    source: Path,
    dtype: torch.dtype | None,
) -> None:
    """Replace every parameter and persistent buffer by the tensor of its name.

    Args:
        module: takes the tensors, often built on the meta device.
        tensors: names, as `module.state_dict()` has them, and values, which the module keeps where
            they are of the right type: they are its own from now on.
        source: named in errors.
        dtype: type of floating-point weights; None keeps the file's, the widest where they differ.
            Buffers keep the type that the module gives them.

    Raises:
        ValueError: the names, shapes or kinds of numbers are not those of the module.
    """
    state = module.state_dict()
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in wanted:
            raise ValueError(f"{source} holds the unknown tensor {name}")
        if name in found:
            raise ValueError(f"{source} holds the tensor {name} twice")
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, config.json asks {wanted[name]}"
            )
        is_float = state[name].is_floating_point()
        is_alike = is_float or tensor.dtype == state[name].dtype
        if tensor.is_floating_point() != is_float or not is_alike:
            raise ValueError(f"{source}: {name} holds numbers of another kind ({tensor.dtype})")
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if name not in parameters:
            target = state[name].dtype
        found[name] = tensor.to(target)
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{source} lacks {', '.join(missing[:3])}{more}")
    floats = {name: t for name, t in found.items() if t.is_floating_point() and name in parameters}
    if len({t.dtype for t in floats.values()}) > 1:
        widest = functools.reduce(torch.promote_types, (t.dtype for t in floats.values()))
        found |= {name: t.to(widest) for name, t in floats.items()}
    module.load_state_dict(found, assign=True)
