"""`astrai-model`: what is in a model folder.

Shapes and kinds of numbers are read from the headers of the weight files, never the weights
themselves, so a folder of any size is told in a moment.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from astrai_core.command_line import CommandLineError, parse_one

if TYPE_CHECKING:
    from astrai_core.model import ModelConfig

PROGRAM = "astrai-model"
_HELP = f"""usage: {PROGRAM} info DIR

What is in a model folder: parameters by part, memory by precision and length of context,
tokenizer and provenance. `{PROGRAM} info --help` lists the options.
"""
_PARTS = {
    "norm": "norms",
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "mlp": "feed-forward",
    "lm_head": "output head",
}
# weights in int8 keep one float32 scale for each output channel, well below 1 % of them
_PRECISIONS = {"float32": 4, "bfloat16": 2, "int8 weights": 1}


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Say what is in a model folder: `astrai-model info DIR`."""

    folder: Path
    """Model folder: config.json and safetensors, with a tokenizer or without."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_HELP, end="")
        sys.exit(0 if given else 2)
    command, *rest = given
    if command != "info":
        _fail(f"{command} is not a command; the one there is: {PROGRAM} info DIR", status=2)
    if rest and not rest[0].startswith("-"):
        rest[0] = f"--folder={rest[0]}"
    elif not rest:
        _fail(f"which folder? {PROGRAM} info DIR", status=2)
    try:
        options = parse_one(rest, f"{PROGRAM} info", InfoOptions)
    except CommandLineError as error:
        _fail(str(error), status=2)
    try:
        print(describe(options.folder))
    except (ValueError, OSError) as error:
        _fail(str(error), status=1)


def describe(folder: Path) -> str:
    """What is in a model folder, on one screen.

    Raises:
        ValueError: the folder is not a whole model folder; the message says what is wrong.
    """
    from astrai_core.model.auto import parse_config, read_config_json

    content = read_config_json(folder)
    config, is_ours = parse_config(content, folder)
    family = "astrai" if is_ours else str(content["model_type"])
    attention = f"{config.attn_type}, {config.n_heads} heads"
    if config.attn_type == "gqa":
        attention += f" of {config.query_dim} over {config.num_kv_heads} of keys and values"
    lines = [
        f"{folder.resolve()}",
        f"  family       {family}",
        f"  shape        {config.n_layers} layers of width {config.dim}; {attention}; "
        f"feed-forward {config.dim_ffn}; context {config.max_len:,} tokens",
        *_parameters(config),
        f"  stored as    {_check_stored(folder, config)}",
        *_memory(config),
        *_tokenizer(folder, config),
        *_provenance(folder, content),
    ]
    return "\n".join(lines)


def _parameters(config: "ModelConfig") -> list[str]:
    counts: Counter[str] = Counter()
    for name, size in _sizes(config).items():
        counts[next(part for key, part in _PARTS.items() if key in name)] += size
    total = counts.total()
    tied = " (the output head too)" if config.tie_weight else ""
    lines = [f"  parameters   {total:,}"]
    for part in _PARTS.values():
        if counts[part]:
            note = tied if part == "embedding" else ""
            lines.append(f"    {part:<14}{counts[part]:>16,}  {counts[part] / total:6.1%}{note}")
    return lines


def _sizes(config: "ModelConfig") -> dict[str, int]:
    import torch

    from astrai_core.model import Transformer

    with torch.device("meta"):
        return {name: p.numel() for name, p in Transformer(config).named_parameters()}


def _check_stored(folder: Path, config: "ModelConfig") -> str:
    """Kinds of numbers in the weight files, whose sum must be that of the architecture."""
    from safetensors import SafetensorError, safe_open

    from astrai_core.interop.huggingface import from_disk_name
    from astrai_core.model.weights import weight_files

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
                    view = tensors.get_slice(disk_name)
                    size = 1
                    for width in view.get_shape():
                        size *= width
                    found[name] = size
                    kinds[str(view.get_dtype())] += size
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from error
    wanted = _sizes(config)
    wrong = sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{folder}: the weights do not fit config.json, first at {wrong[0]} (has "
            f"{found.get(wrong[0], 0):,} numbers, should have {wanted.get(wrong[0], 0):,})"
        )
    size = sum(file.stat().st_size for file in files)
    names = ", ".join(kind for kind, _ in kinds.most_common())
    return f"{names} in {len(files)} file{'s' * (len(files) != 1)}, {_bytes(size)}"


def _memory(config: "ModelConfig") -> list[str]:
    """Weights by precision, and what one context adds to them."""
    total = sum(_sizes(config).values())
    matrices = sum(
        size
        for name, size in _sizes(config).items()
        if ("proj.weight" in name or name == "lm_head.weight") and "kv_b_proj" not in name
    )
    heads, key_width, value_width = config.cache_shape
    per_token = config.n_layers * heads * (key_width + value_width)
    lengths = sorted({min(length, config.max_len) for length in (2048, 8192, config.max_len)})
    header = "".join(f"{f'+ {length:,} tokens':>18}" for length in lengths)
    lines = [f"  memory       {'weights':>14}{header}"]
    for name, width in _PRECISIONS.items():
        # int8 is for the matrices of linear layers; the rest and the KV cache are bfloat16
        cache_width = max(width, 2)
        weights = total * cache_width - matrices * (cache_width - width)
        cells = "".join(
            f"{_bytes(weights + per_token * length * cache_width):>18}" for length in lengths
        )
        lines.append(f"    {name:<13}{_bytes(weights):>12}{cells}")
    lines.append(f"    one token of KV cache is {per_token:,} numbers")
    return lines


def _tokenizer(folder: Path, config: "ModelConfig") -> list[str]:
    if not (folder / "tokenizer.json").is_file():
        return ["  tokenizer    none: text cannot be served from this folder alone"]
    from astrai_core.tokenizer import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model a vocab_size of "
            f"{config.vocab_size}: it is not this model's tokenizer"
        )
    template = tokenizer.chat_template
    chat = f"template {template.fingerprint[:12]}" if template else "no chat template"
    stops = ", ".join(
        tokenizer.decode([i], skip_special_tokens=False) for i in sorted(tokenizer.stop_ids)
    )
    return [
        f"  tokenizer    {tokenizer.vocab_size:,} tokens, {len(tokenizer.control_ids)} of them "
        f"control tokens; stops at {stops or 'none'}",
        f"               hash {tokenizer.fingerprint[:12]}, {chat}",
    ]


def _provenance(folder: Path, content: dict[str, object]) -> list[str]:
    written = datetime.fromtimestamp((folder / "config.json").stat().st_mtime)
    facts = [f"written {written:%Y-%m-%d %H:%M}"]
    for key, told in (
        ("_name_or_path", "from {}"),
        ("transformers_version", "by transformers {}"),
        ("architectures", "as {}"),
    ):
        if value := content.get(key):
            value = ", ".join(map(str, value)) if isinstance(value, list) else value
            facts.append(told.format(value))
    if (folder / "trainer").is_dir():
        facts.append("a checkpoint: training can go on from it")
    return [f"  provenance   {'; '.join(facts)}"]


def _bytes(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} B"


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}: {' '.join(message.split())}\n")
    sys.exit(status)
