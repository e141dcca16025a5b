"""What is in a model folder: its parameters, the memory they take, where it comes from.

Shapes and kinds of numbers are read from the headers of the weight files, never the weights
themselves, so a folder of any size is told in a moment.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from astrai_core.interop.huggingface import from_disk_name, further_layers, layer_of
from astrai_core.model import ModelConfig, Transformer
from astrai_core.model.auto import parse_config, read_config_json
from astrai_core.model.quantization import Scheme, described_scheme, quantize_
from astrai_core.model.weights import weight_files
from astrai_core.tokenizer import AutoTokenizer

_PARTS = {
    "norm": "norms",
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "mlp.experts": "experts",
    "mlp.shared_experts": "shared experts",
    "mlp.gate.": "router",
    "mlp": "feed-forward",
    "lm_head": "output head",
}
# bytes of a number; int4 keeps a bfloat16 scale and zero for each group of 128
_SCHEMES: dict[str, Scheme] = {"int8": "w8a8", "int4": "int4"}
_CACHE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer of a folder."""

    tokens: int
    """One more than the largest id."""
    control_tokens: int
    """Those that no user's text becomes."""
    stops: list[str]
    """Tokens that end an answer."""
    fingerprint: str
    """Hash of tokenizer.json."""
    chat_template: str | None
    """Hash of the chat template; null where there is none."""


@dataclass(frozen=True, kw_only=True)
class FolderInfo:
    """What a folder holds; the JSON has these keys."""

    folder: str
    """Where it is."""
    family: str
    """Its model_type."""
    architecture: dict[str, object]
    """The fields of our `ModelConfig`, whatever the family."""
    parameters: dict[str, int]
    """Numbers in each part of the model, each counted once."""
    total: int
    """All of them."""
    activated: int
    """Those that one token meets: all but the experts not chosen for it."""
    stored: dict[str, int]
    """Numbers of each type in the weight files."""
    files: int
    """How many weight files there are."""
    file_bytes: int
    """Their size together."""
    weight_bytes: dict[str, int]
    """Memory of the weights by precision."""
    cache_bytes: dict[str, dict[int, int]]
    """Memory of the KV cache by precision and length of the context in tokens."""
    tokenizer: TokenizerInfo | None
    """Null where text cannot be served from this folder alone."""
    provenance: dict[str, object]
    """When it was written, and what its files say of where it comes from."""

    def to_json(self) -> str:
        """Everything, as one JSON object."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=2)

    def to_text(self) -> str:
        """Everything that matters, on one screen."""
        kinds = ", ".join(sorted(self.stored, key=self.stored.__getitem__, reverse=True))
        return "\n".join(
            [
                self.folder,
                f"  family       {self.family}",
                f"  shape        {_shape(self.architecture)}",
                *self._parameters(),
                f"  stored as    {kinds} in {self.files} file{'s' * (self.files != 1)}, "
                f"{_bytes(self.file_bytes)}",
                *self._memory(),
                *self._tokenizer(),
                f"  provenance   {'; '.join(_told(self.provenance))}",
            ]
        )

    def _parameters(self) -> list[str]:
        also = f"; {self.activated:,} activated for a token" * (self.activated != self.total)
        lines = [f"  parameters   {self.total:,}{also}"]
        for part, size in self.parameters.items():
            is_tied = part == "embedding" and self.architecture["tie_weight"]
            note = " (the output head too)" if is_tied else ""
            lines.append(f"    {part:<14}{size:>16,}  {size / self.total:6.1%}{note}")
        return lines

    def _memory(self) -> list[str]:
        lines = [_row("memory", self.weight_bytes), _row("  weights", self.weight_bytes.values())]
        lines.append(_row("KV cache", self.cache_bytes))
        for length in next(iter(self.cache_bytes.values())):
            sizes = [of_length[length] for of_length in self.cache_bytes.values()]
            lines.append(_row(f"  {length:,} token{'s' * (length != 1)}", sizes))
        return lines

    def _tokenizer(self) -> list[str]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return ["  tokenizer    none: text cannot be served from this folder alone"]
        template = tokenizer.chat_template
        chat = f"chat template {template[:12]}" if template else "no chat template"
        return [
            f"  tokenizer    {tokenizer.tokens:,} tokens, {tokenizer.control_tokens} of them "
            f"control tokens; stops at {', '.join(tokenizer.stops) or 'none'}",
            f"               hash {tokenizer.fingerprint[:12]}, {chat}",
        ]


def read_folder(folder: Path) -> FolderInfo:
    """Look into a model folder.

    Raises:
        ValueError: the folder is not a whole model folder; the message says what is wrong.
    """
    content = read_config_json(folder)
    config, is_ours = parse_config(content, folder)
    sizes = _sizes(config)
    further = range(0) if is_ours else further_layers(content, config.n_layers)
    stored_sizes = _sizes(config, described_scheme(content))
    stored, files = _check_stored(folder, config, stored_sizes, further)
    total = sum(sizes.values())
    counts: Counter[str] = Counter()
    for name, size in sizes.items():
        counts[next(part for key, part in _PARTS.items() if key in name)] += size
    experts = counts["experts"]
    activated = total
    if experts:
        activated -= experts - experts * config.n_activated_experts // config.n_routed_experts
    return FolderInfo(
        folder=str(folder.resolve()),
        family="astrai" if is_ours else str(content["model_type"]),
        architecture=dataclasses.asdict(config),
        parameters={part: counts[part] for part in _PARTS.values() if counts[part]},
        total=total,
        activated=activated,
        stored=stored,
        files=len(files),
        file_bytes=sum(file.stat().st_size for file in files),
        weight_bytes=_weight_bytes(config),
        cache_bytes=_cache_bytes(config),
        tokenizer=_read_tokenizer(folder, config),
        provenance=_provenance(folder, content),
    )


def _sizes(config: ModelConfig, scheme: Scheme | None = None) -> dict[str, int]:
    with torch.device("meta"):
        model = Transformer(config)
        if scheme is not None:
            quantize_(model, scheme)
    return {name: tensor.numel() for name, tensor in model.state_dict().items()}


def _check_stored(
    folder: Path, config: ModelConfig, wanted: Mapping[str, int], further: range
) -> tuple[dict[str, int], list[Path]]:
    """Count the numbers of each type in the weight files, which must be the architecture's.

    Layers in `further` only predict tokens further ahead, and nothing here loads them.
    """
    files = weight_files(folder)
    found: dict[str, int] = {}
    kinds: Counter[str] = Counter()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for disk_name in tensors.keys():  # noqa: SIM118 - not a dict
                    name = from_disk_name(disk_name)
                    if name is None or (config.tie_weight and name == "lm_head.weight"):
                        continue
                    if layer_of(name) in further:
                        continue
                    view = tensors.get_slice(disk_name)
                    size = 1
                    for width in view.get_shape():
                        size *= width
                    found[name] = size
                    kinds[str(view.get_dtype())] += size
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from error
    wrong = sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{folder}: the weights do not fit config.json, first at {wrong[0]} (has "
            f"{found.get(wrong[0], 0):,} numbers, should have {wanted.get(wrong[0], 0):,})"
        )
    return dict(kinds), files


def _weight_bytes(config: ModelConfig) -> dict[str, int]:
    """Weights in memory by precision; what is not rounded to int8 or int4 is float32.

    A scheme that some layer's width rules out is not among them.
    """
    with torch.device("meta"):
        models = {name: Transformer(config) for name in ("float32", "bfloat16", *_SCHEMES)}
    models["bfloat16"].to(torch.bfloat16)
    for name, scheme in _SCHEMES.items():
        try:
            quantize_(models[name], scheme)
        except ValueError:  # int4 wants inputs in groups
            del models[name]
    return {
        name: sum(tensor.nbytes for tensor in model.state_dict().values())
        for name, model in models.items()
    }


def _cache_bytes(config: ModelConfig) -> dict[str, dict[int, int]]:
    heads, key_width, value_width = config.cache_shape
    per_token = config.n_layers * heads * (key_width + value_width)
    lengths = sorted({1, *(min(length, config.max_len) for length in (2048, 8192, config.max_len))})
    return {
        name: {length: per_token * width * length for length in lengths}
        for name, width in _CACHE_BYTES.items()
    }


def _read_tokenizer(folder: Path, config: ModelConfig) -> TokenizerInfo | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model a vocab_size of "
            f"{config.vocab_size}: it is not this model's tokenizer"
        )
    template = tokenizer.chat_template
    return TokenizerInfo(
        tokens=tokenizer.vocab_size,
        control_tokens=len(tokenizer.control_ids),
        stops=[
            tokenizer.decode([i], skip_special_tokens=False) for i in sorted(tokenizer.stop_ids)
        ],
        fingerprint=tokenizer.fingerprint,
        chat_template=template.fingerprint if template else None,
    )


def _provenance(folder: Path, content: Mapping[str, object]) -> dict[str, object]:
    written = datetime.fromtimestamp((folder / "config.json").stat().st_mtime)
    keys = ("_name_or_path", "transformers_version", "architectures")
    return {
        "written": f"{written:%Y-%m-%d %H:%M}",
        **{key: content[key] for key in keys if content.get(key)},
        "is_checkpoint": (folder / "trainer").is_dir(),
    }


def _told(provenance: Mapping[str, object]) -> list[str]:
    words = {
        "written": "written {}",
        "_name_or_path": "from {}",
        "transformers_version": "by transformers {}",
        "architectures": "as {}",
    }
    told = []
    for key, sentence in words.items():
        if value := provenance.get(key):
            value = ", ".join(map(str, value)) if isinstance(value, list) else value
            told.append(sentence.format(value))
    if provenance["is_checkpoint"]:
        told.append("a checkpoint: training can go on from it")
    return told


def _shape(architecture: Mapping[str, object]) -> str:
    config = ModelConfig.from_dict(dict(architecture))
    attention = f"{config.attn_type}, {config.n_heads} heads"
    if config.attn_type == "gqa":
        attention += f" of {config.query_dim} over {config.num_kv_heads} of keys and values"
    else:
        attention += f" over a latent of {config.kv_lora_rank} + {config.qk_rope_head_dim}"
    feed_forward = f"feed-forward {config.dim_ffn}"
    if config.ffn_type == "moe":
        feed_forward = (
            f"{config.n_activated_experts} of {config.n_routed_experts} experts of "
            f"{config.dim_ffn_expert}, {config.n_shared_experts} shared"
        )
        if config.first_k_dense:
            feed_forward += f", after {config.first_k_dense} dense layers of {config.dim_ffn}"
    return (
        f"{config.n_layers} layers of width {config.dim}; {attention}; {feed_forward}; "
        f"context {config.max_len:,} tokens"
    )


def _row(name: str, cells: Iterable[str | int]) -> str:
    shown = (cell if isinstance(cell, str) else _bytes(cell) for cell in cells)
    return f"  {name:<18}" + "".join(f"{cell:>12}" for cell in shown)


def _bytes(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} B"
