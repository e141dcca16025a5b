"""Weights in a folder: safetensors, whole or in shards. Nothing is unpickled.

A tensor that is missing, left over or of another shape is an error by name; a model never keeps a
random weight where the folder had none.
"""

import functools
import io
import json
import mmap
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
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_WORTH_MAPPING = 1 << 18
"""Bytes of a matrix from which it may be a mapping."""


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


def read_tensors(file: Path, *, maps_bytes: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of one safetensors file, each in memory of its own.

    The bytes are read, not mapped and copied: pages of a mapping would count as memory too, and
    Python's lock is free for others from one end of a tensor to the other.

    Args:
        file: a safetensors file.
        maps_bytes: large matrices of int8 stay in the file, each a mapping of its own that goes
            with its tensor. For who makes something else of them at once: were the file cut short
            meanwhile, by other means than replacing it, the process would end.

    Raises:
        ValueError: the file is truncated or not safetensors.
    """
    try:
        with safe_open(file, framework="pt"):
            pass  # it looks whether the header is sound and the file as long as that says
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from error
    with file.open("rb", buffering=0) as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{file}: {name} holds numbers of a kind that torch has not")
            begin, end = (8 + length + place for place in entry["data_offsets"])
            if maps_bytes and entry["dtype"] == "I8" and end - begin >= _WORTH_MAPPING:
                content = _mapped(stream, begin, end)
            else:
                content = torch.empty(end - begin, dtype=torch.uint8)
                stream.seek(begin)
                _fill(content.numpy().data, stream)
            yield name, content.view(_DTYPES[entry["dtype"]]).view(entry["shape"])


def _mapped(stream: io.FileIO, begin: int, end: int) -> Tensor:
    """Bytes of a file that the system reads when they are looked at, from now on."""
    first = begin - begin % mmap.ALLOCATIONGRANULARITY
    mapping = mmap.mmap(stream.fileno(), end - first, access=mmap.ACCESS_COPY, offset=first)
    mapping.madvise(mmap.MADV_WILLNEED)
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=begin - first, count=end - begin)


def _fill(content: memoryview, stream: io.RawIOBase) -> None:
    """Read as many bytes as there is room for; the system gives 2 GB at a time at most."""
    while content:
        count = stream.readinto(content)
        if not count:
            raise ValueError("a file of weights became shorter while it was read")
        content = content[count:]


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
