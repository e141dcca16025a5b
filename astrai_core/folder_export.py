"""A model folder in the forms that others read: a Hugging Face family's folder, or one GGUF file.

The forward pass stays the same one, number for number; where the other side cannot say what our
architecture does, that is an error with the name of the field, never an approximation.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from astrai_core.atomic_folder import replace_folder
from astrai_core.folder_info import read_folder
from astrai_core.interop import gguf, huggingface, huggingface_export
from astrai_core.interop.rotary_pairs import reorder_tail, to_halves, to_neighbours
from astrai_core.model import AutoModel, ModelConfig
from astrai_core.model.auto import is_adapter_folder, parse_config, read_config_json, write_model
from astrai_core.model.config import read_json
from astrai_core.model.quantization import described_scheme
from astrai_core.model.rotary import RotaryEmbedding
from astrai_core.model.weights import INDEX, read_tensors, weight_files, write_tensors
from astrai_core.tokenizer import AutoTokenizer

Precision = Literal["float32", "bfloat16", "float16"]
State = dict[str, Tensor]

_KINDS: dict[torch.dtype, gguf.Kind] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}

# what a folder may hold beside its weights; a trainer's state and pickled weights are left behind
_COMPANIONS = {".json", ".jinja", ".txt", ".model", ".md", ".tiktoken", ""}
_BIAS = "e_score_correction_bias"  # float32 in whatever type the rest is


def export_huggingface(folder: Path, out: Path, dtype: Precision | None) -> str:
    """Write a folder that transformers loads with its own classes.

    Args:
        folder: a model folder of ours, or of a family already, which is then copied.
        out: takes the new folder; one that is there is replaced.
        dtype: type of the weights; None keeps it.

    Returns:
        One line for the user.

    Raises:
        ValueError: no family fits exactly, or the folder is not a whole model folder.
    """
    content = _read_whole(folder)
    _refuse_place(folder, out)
    config, is_ours = parse_config(content, folder)
    if not is_ours:
        family = str(content["model_type"])
        with replace_folder(out) as temporary:
            _copy(folder, content, temporary, dtype)
        return f"{out}: a copy of the {family} folder {folder}"
    family, translated = choose_family(config)
    model = AutoModel.from_pretrained(folder, dtype and getattr(torch, dtype))
    meant = ModelConfig.from_dict(huggingface.to_fields(translated))
    state = rotate_as(model.state_dict(), config, interleaved=meant.rope_interleaved)
    state |= _missing_biases(config, meant)
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    translated |= _token_ids(tokenizer) | {"dtype": None, "torch_dtype": None}
    with replace_folder(out) as temporary:
        write_model(temporary, translated, state)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    text = "with its tokenizer" if tokenizer else "without a tokenizer, since there is none"
    return f"{out}: a {family} folder {text}"


def export_gguf(folder: Path, out: Path, kind: gguf.Kind | None, pre: str | None) -> str:
    """Write a GGUF file for llama.cpp.

    Args:
        folder: a model folder of ours or of a family, with its tokenizer.
        out: takes the file; an older one is replaced.
        kind: type of the matrices; None is that of the folder.
        pre: llama.cpp's name of the rule that splits text; None is the one that gives our tokens.

    Returns:
        One line for the user.

    Raises:
        ValueError: llama.cpp computes or splits something differently, or the folder is not whole.
    """
    content = _read_whole(folder)
    config, _ = parse_config(content, folder)
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file, such as {out / 'model.gguf'}")
    rotary = RotaryEmbedding(_rotary_width(config), config.rope_theta)
    scaled = RotaryEmbedding(_rotary_width(config), config.rope_theta, config.rope_scaling)
    device = torch.device("cpu")
    divisors = rotary.frequencies(device) / scaled.frequencies(device)
    architecture = gguf.choose_architecture(dataclasses.asdict(config), divisors)
    vocabulary = _vocabulary(folder, config, pre)
    model = AutoModel.from_pretrained(folder)
    chosen = kind or _KINDS[next(model.parameters()).dtype]
    state = rotate_as(model.state_dict(), config, interleaved=architecture.rope_interleaved)
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = gguf.write_file(out, folder.resolve().name, architecture, state, vocabulary, chosen)
    note = f" ({kept} matrices stay f32: their rows are no multiple of 32)" if kept else ""
    return f"{out}: {architecture.name} for llama.cpp in {chosen}{note}, tokens by {vocabulary.pre}"


def choose_family(config: ModelConfig) -> tuple[str, dict[str, object]]:
    """Return the family that says exactly this architecture, and its `config.json`.

    Rotary pairs do not matter, since weights can be reordered from one kind to the other.

    Raises:
        ValueError: there is none; the message names the fields that the nearest one cannot say.
    """
    fields = dataclasses.asdict(_settled(config))
    nearest: tuple[str, list[str]] | None = None
    for family in huggingface_export.CLASSES:
        translated = huggingface_export.to_config(family, fields)
        differing = huggingface_export.cannot_say(family, fields)
        try:
            meant = dataclasses.asdict(ModelConfig.from_dict(huggingface.to_fields(translated)))
        except ValueError:  # the family has no such attention, or no such experts
            continue
        differing += [
            name
            for name, value in fields.items()
            if meant[name] != value and name != "rope_interleaved"
        ]
        if not differing:
            return family, translated
        if nearest is None or len(differing) < len(nearest[1]):
            nearest = family, differing
    assert nearest is not None
    told = ", ".join(f"{name} {fields[name]!r}" for name in nearest[1])
    raise ValueError(
        f"no Hugging Face family fits this architecture exactly; the nearest, {nearest[0]}, cannot "
        f"say {told}. astrai-serve serves the folder as it is"
    )


def rotate_as(state: Mapping[str, Tensor], config: ModelConfig, *, interleaved: bool) -> State:
    """Reorder the weights of queries and keys to the other kind of rotary pairs, if need be."""
    if config.rope_interleaved == interleaved:
        return dict(state)
    result = dict(state)
    reorder = to_neighbours if interleaved else to_halves
    for name, tensor in state.items():
        part = name.split(".")[-2]
        if config.attn_type == "gqa" and part in ("q_proj", "k_proj", "q_norm", "k_norm"):
            result[name] = reorder(tensor, config.query_dim)
        elif config.attn_type == "mla" and part in ("q_proj", "q_b_proj"):
            tail = config.qk_rope_head_dim
            result[name] = reorder_tail(tensor, config.query_dim, tail, neighbours=interleaved)
        elif part == "kv_a_proj_with_mqa":
            tail = config.qk_rope_head_dim
            result[name] = reorder_tail(tensor, len(tensor), tail, neighbours=interleaved)
    return result


def _settled(config: ModelConfig) -> ModelConfig:
    """The same architecture, with one value for each field that it does not use."""
    if not config.use_gated_attention:
        config = dataclasses.replace(config, attention_gate="headwise")
    if config.moe_topk_method == "greedy" and config.moe_scoring == "sigmoid":
        # DeepSeek-V3 with a bias of zero in one group
        config = dataclasses.replace(config, moe_topk_method="noaux_tc")
    return config


def _missing_biases(config: ModelConfig, meant: ModelConfig) -> State:
    if config.moe_topk_method == meant.moe_topk_method:
        return {}
    return {
        f"layers.{layer}.mlp.gate.{_BIAS}": torch.zeros(config.n_routed_experts)
        for layer in range(config.first_k_dense, config.n_layers)
    }


def _token_ids(tokenizer: AutoTokenizer | None) -> dict[str, object]:
    """Ids in config.json, where some families would assume Llama's."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    stops = sorted(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": tokenizer.pad_id,
    }


def _vocabulary(folder: Path, config: ModelConfig, pre: str | None) -> gguf.Vocabulary:
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json, which a GGUF file holds too")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as whole:
        # the folder's other files may add tokens to those of tokenizer.json
        tokenizer.save_pretrained(whole)
        content = read_json(Path(whole) / "tokenizer.json")
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    # llama.cpp has three names for what ends an answer
    others = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    names = ["eot", "eom"] if tokenizer.eos_id is not None else ["eos", "eot", "eom"]
    if len(others) > len(names):
        raise ValueError(
            f"{folder}: {len(tokenizer.stop_ids)} tokens end an answer; a GGUF file names three"
        )
    roles |= dict(zip(names, others, strict=False))
    plain, marked = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=True)
    template = tokenizer.chat_template
    return gguf.read_vocabulary(
        content,
        config.vocab_size,
        {role: token_id for role, token_id in roles.items() if token_id is not None},
        adds_bos=marked[: -len(plain)] == [tokenizer.bos_id],
        adds_eos=marked != plain and marked[-1] == tokenizer.eos_id,
        chat_template=template.source if template else None,
        pre=pre,
    )


def _rotary_width(config: ModelConfig) -> int:
    return config.qk_rope_head_dim if config.attn_type == "mla" else config.query_dim


def _copy(folder: Path, content: Mapping[str, Any], out: Path, dtype: Precision | None) -> None:
    """Copy a family's folder, its weights in another type if asked."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix in _COMPANIONS:
            shutil.copyfile(path, out / path.name)
    for file in weight_files(folder):
        if dtype is None:
            shutil.copyfile(file, out / file.name)
            continue
        target = getattr(torch, dtype)
        write_tensors(
            out / file.name,
            {
                name: tensor.to(target)
                if tensor.is_floating_point() and not name.endswith(_BIAS)
                else tensor
                for name, tensor in read_tensors(file)
            },
        )
    if dtype is None:
        return
    keys = {key for key in ("dtype", "torch_dtype") if key in content} or {"dtype", "torch_dtype"}
    _write_json(out / "config.json", {**content, **dict.fromkeys(keys, dtype)})
    if (out / INDEX).is_file():
        # its one other fact is the size of all tensors, which is another one now
        index = {key: value for key, value in read_json(out / INDEX).items() if key != "metadata"}
        sizes = [
            tensor.numel() * tensor.element_size()
            for file in weight_files(out)
            for _, tensor in read_tensors(file)
        ]
        _write_json(out / INDEX, {"metadata": {"total_size": sum(sizes)}, **index})


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_whole(folder: Path) -> dict[str, object]:
    """Read `config.json` of a folder whose weights are all there, in their own shapes."""
    content = read_config_json(folder)
    if is_adapter_folder(folder):
        raise ValueError(
            f"{folder} holds an adapter, not a whole model; merge it into its base first "
            "(astrai-model merge)"
        )
    if (stored := described_scheme(content)) is not None:
        raise ValueError(
            f"{folder} holds {stored} weights, which only AstrAI reads; export the folder it was "
            "made from"
        )
    read_folder(folder)
    return content


def _refuse_place(folder: Path, out: Path) -> None:
    place, source = out.resolve(), folder.resolve()
    if place == source or place in source.parents or source in place.parents:
        raise ValueError(
            f"--out {out} and the folder {folder} must lie apart; choose another --out"
        )
    if place.is_dir() and any(place.iterdir()) and not (place / "config.json").is_file():
        raise ValueError(
            f"--out {out} is a folder with other files in it, which would be lost; choose another"
        )
