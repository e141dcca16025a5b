"""`astrai-model`: what is in a model folder, and into which other forms it can go.

Here options become calls; the work itself stands in a file of its own for each command, imported
only when it is asked for, so that help and errors come at once.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from astrai_core.command_line import CommandLineError, parse_one, told
from astrai_core.nearest_name import did_you_mean

PROGRAM = "astrai-model"


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Say what is in a model folder; no weight is read, only the headers of their files."""

    folder: Path
    """Model folder: config.json and safetensors, with a tokenizer or without."""
    json: bool = False
    """Print one JSON object, for programs."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a folder for transformers, or a GGUF file for llama.cpp, of exactly the same model."""

    folder: Path
    """Model folder, ours or of a Hugging Face family."""
    format: Literal["hf", "gguf"]
    """A folder that transformers loads with its own classes, or one file for llama.cpp."""
    out: Path
    """The folder or file to write; a model folder that is there is replaced."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """hf: type of the weights; null keeps it."""
    type: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """gguf: type of the matrices; null is f32, f16 or bf16, as the folder has it."""
    pre: str | None = None
    """gguf: llama.cpp's name of the rule that splits text before merging; null chooses the one
    that gives our tokens, and refuses where none does."""

    def __post_init__(self) -> None:
        foreign = {"hf": ("type", "pre"), "gguf": ("dtype",)}[self.format]
        for name in foreign:
            if getattr(self, name) is not None:
                other = "gguf" if self.format == "hf" else "hf"
                raise ValueError(f"--{name} is for --format {other}; leave it out")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merge a LoRA adapter into its base: a whole model folder, which needs neither of them."""

    folder: Path
    """Folder of the adapter, ours or PEFT's; any checkpoint of a LoRA run is one."""
    out: Path
    """The model folder to write; one that is there is replaced."""
    model: Path | None = None
    """Model folder of the base; null is the one that the adapter names."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Write the folder with its weights in int8 or int4: faster to serve, and not to be trained."""

    folder: Path
    """Model folder, ours or of a Hugging Face family."""
    out: Path
    """The model folder to write; one that is there is replaced."""
    weights: Literal["w8a8", "int8", "int4"] = "w8a8"
    """w8a8 multiplies int8 weights by int8 activations; int8 and int4 round the weights alone."""


def _quantize(options: QuantizeOptions) -> str:
    from astrai_core.folder_quantization import quantize_folder

    return quantize_folder(options.folder, options.out, options.weights)


def _export(options: ExportOptions) -> str:
    if options.format == "hf":
        from astrai_core.folder_export import export_huggingface

        return export_huggingface(options.folder, options.out, options.dtype)
    from astrai_core.folder_export import export_gguf

    return export_gguf(options.folder, options.out, options.type, options.pre)


def _merge(options: MergeOptions) -> str:
    from astrai_core.folder_merge import merge_folder

    return merge_folder(options.folder, options.model, options.out)


def _info(options: InfoOptions) -> str:
    from astrai_core.folder_info import read_folder

    info = read_folder(options.folder)
    return info.to_json() if options.json else info.to_text()


# a command's options, and what it does with them; what is returned is printed
_COMMANDS: dict[str, tuple[type, Callable[[Any], str]]] = {
    "info": (InfoOptions, _info),
    "export": (ExportOptions, _export),
    "merge": (MergeOptions, _merge),
    "quantize": (QuantizeOptions, _quantize),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help(), end="")
        sys.exit(0 if given else 2)
    command, *rest = given
    if command not in _COMMANDS:
        hint = did_you_mean(command, _COMMANDS)
        _fail(f"{command} is not a command{hint}; there are {', '.join(_COMMANDS)}", status=2)
    options_type, run = _COMMANDS[command]
    try:
        options = parse_one(rest, f"{PROGRAM} {command}", options_type, operand="folder")
    except CommandLineError as error:
        _fail(str(error), status=2)
    try:
        print(run(options))
    except (ValueError, OSError) as error:
        _fail(told(error), status=1)


def _help() -> str:
    lines = [f"usage: {PROGRAM} COMMAND DIR [OPTIONS]", ""]
    for command, (options_type, _) in _COMMANDS.items():
        first_line = (options_type.__doc__ or "").partition("\n")[0]
        lines.append(f"  {command:<10}{first_line}")
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help lists a command's options.", ""])


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}: {' '.join(message.split())}\n")
    sys.exit(status)
