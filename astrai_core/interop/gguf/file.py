"""Writing the file: tensors under llama.cpp's names, in its types, behind what describes them."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from astrai_core.interop.gguf.architecture import Architecture
from astrai_core.interop.gguf.vocabulary import Vocabulary

Kind = Literal["f32", "f16", "bf16", "q8_0"]

_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
_BLOCK = 32  # numbers that share a scale in q8_0


def write_file(
    path: Path,
    name: str,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    kind: Kind,
) -> int:
    """Write a GGUF file at once or not at all.

    Args:
        path: the file; an older one is replaced.
        name: of the model, for people.
        architecture: what `choose_architecture` chose.
        tensors: weights under our names, rotary pairs as the architecture has them.
        vocabulary: the tokenizer.
        kind: type of the matrices; vectors and the router stay f32.

    Returns:
        How many matrices stayed f32, because their rows are no multiple of a block of q8_0.

    Raises:
        ValueError: the package gguf is missing, or f16 cannot hold a number.
    """
    gguf = _import_gguf()
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    writer = gguf.GGUFWriter(temporary, architecture.name)
    try:
        _add_metadata(gguf, writer, name, architecture, vocabulary, kind)
        n_layers = int(architecture.metadata["block_count"])
        laid_out = dict(_lay_out(gguf, architecture, tensors, n_layers))
        kept = 0
        for theirs, tensor in laid_out.items():
            of_tensor = _kind_of(theirs, tensor, kind)
            kept += of_tensor == "f32" and tensor.dim() > 1 and "ffn_gate_inp" not in theirs
            quantized = getattr(gguf.GGMLQuantizationType, of_tensor.upper())
            shape, dtype, size = _stored(gguf, tensor, quantized)
            writer.add_tensor_info(theirs, shape, dtype, size, raw_dtype=quantized)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for theirs, tensor in laid_out.items():
            writer.write_tensor_data(_encode(gguf, theirs, tensor, _kind_of(theirs, tensor, kind)))
        writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # first: on a full disk closing fails too
        writer.close()
        raise
    return kept if kind != "f32" else 0


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "--format gguf needs the package gguf: pip install 'astrai[export]'"
        ) from None
    return gguf


def _add_metadata(
    gguf: ModuleType,
    writer: Any,
    name: str,
    architecture: Architecture,
    vocabulary: Vocabulary,
    kind: Kind,
) -> None:
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[kind])
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add[str] = writer.add_string
    for key, value in architecture.metadata.items():
        add[type(value)](f"{architecture.name}.{key}", value)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([gguf.TokenType[one] for one in vocabulary.types])
    writer.add_token_merges(vocabulary.merges)
    for role, token_id in vocabulary.special_ids.items():
        getattr(writer, f"add_{role}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _lay_out(
    gguf: ModuleType, architecture: Architecture, tensors: Mapping[str, Tensor], n_layers: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield llama.cpp's names and tensors: experts stacked, MLA's key and value matrices apart."""
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    names = gguf.get_tensor_name_map(arch, n_layers)

    def theirs(ours: str) -> str:
        on_disk = ours if ours.startswith("lm_head.") else f"model.{ours}"
        on_disk = on_disk.replace("e_score_correction_bias", "e_score_correction.bias")
        found = names.get_name(on_disk, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp's {architecture.name} has no tensor for {ours}")
        return found

    experts: dict[str, dict[int, Tensor]] = {}
    for ours, tensor in tensors.items():
        head, is_expert, tail = ours.partition(".mlp.experts.")
        if is_expert:
            number, _, projection = tail.partition(".")
            experts.setdefault(f"{head}.mlp.experts.{projection}", {})[int(number)] = tensor
        elif ours.endswith("kv_b_proj.weight"):
            for key, part in _split_latent(tensor, architecture).items():
                yield theirs(ours.replace("kv_b_proj", key)), part
        else:
            yield theirs(ours), tensor
    for ours, of_number in experts.items():
        stack = torch.stack([of_number[number] for number in range(len(of_number))])  # (E, out, in)
        yield theirs(ours), stack
    yield from architecture.tensors.items()


def _split_latent(weight: Tensor, architecture: Architecture) -> dict[str, Tensor]:
    """MLA's matrix (H * (P + V), r) as keys (H, r, P) and values (H, V, r)."""
    metadata = architecture.metadata
    value_width = int(metadata["attention.value_length_mla"])
    heads = weight.unflatten(0, (int(metadata["attention.head_count"]), -1))  # (H, P + V, r)
    to_key, to_value = heads.split((heads.shape[1] - value_width, value_width), dim=1)
    return {"k_b_proj": to_key.transpose(1, 2).contiguous(), "v_b_proj": to_value.contiguous()}


def _kind_of(name: str, tensor: Tensor, kind: Kind) -> Kind:
    # a rounded router chooses other experts
    if tensor.dim() == 1 or "ffn_gate_inp" in name:
        return "f32"
    return "f32" if kind == "q8_0" and tensor.shape[-1] % _BLOCK else kind


def _stored(gguf: ModuleType, tensor: Tensor, quantized: Any) -> tuple[list[int], Any, int]:
    """Shape, type and bytes of a tensor in the file, in the terms of gguf's writer."""
    block, size = gguf.GGML_QUANT_SIZES[quantized]
    num_bytes = tensor.numel() // block * size
    of_numpy = {"F32": np.float32, "F16": np.float16}.get(quantized.name)
    if of_numpy is not None:
        return list(tensor.shape), np.dtype(of_numpy), num_bytes
    byte_shape = [*tensor.shape[:-1], tensor.shape[-1] // block * size]
    return byte_shape, np.dtype(np.uint8), num_bytes


def _encode(gguf: ModuleType, name: str, tensor: Tensor, kind: Kind) -> "np.ndarray[Any, Any]":
    if kind == "bf16":
        return tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    numbers = tensor.float().contiguous().numpy()
    if kind == "f32":
        return numbers
    if kind == "f16":
        halves = tensor.half()
        if not torch.equal(halves.isfinite(), tensor.isfinite()):
            raise ValueError(
                f"--type f16 cannot hold {name}, whose largest number is "
                f"{tensor.abs().max():.3g}; take bf16 or f32"
            )
        return halves.contiguous().numpy()
    return gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
