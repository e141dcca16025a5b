"""`astrai-model`: what is in a model folder, and into which other forms it can go.

Here options become calls; the work itself stands in a file of its own for each command, imported
only when it is asked for, so that help and errors come at once.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from astrai_core.command_line import CommandLineError, parse_one

PROGRAM = "astrai-model"


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Say what is in a model folder; no weight is read, only the headers of their files."""

    folder: Path
    """Model folder: config.json and safetensors, with a tokenizer or without."""
    json: bool = False
    """Print one JSON object, for programs."""


def _info(options: InfoOptions) -> str:
    from astrai_core.folder_info import read_folder

    info = read_folder(options.folder)
    return info.to_json() if options.json else info.to_text()


# a command's options, and what it does with them; what is returned is printed
_COMMANDS: dict[str, tuple[type, Callable[[Any], str]]] = {
    "info": (InfoOptions, _info),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help(), end="")
        sys.exit(0 if given else 2)
    command, *rest = given
    if command not in _COMMANDS:
        _fail(f"{command} is not a command; there are {', '.join(_COMMANDS)}", status=2)
    options_type, run = _COMMANDS[command]
    try:
        options = parse_one(rest, f"{PROGRAM} {command}", options_type, operand="folder")
    except CommandLineError as error:
        _fail(str(error), status=2)
    try:
        print(run(options))
    except (ValueError, OSError) as error:
        _fail(str(error), status=1)


def _help() -> str:
    lines = [f"usage: {PROGRAM} COMMAND DIR [OPTIONS]", ""]
    for command, (options_type, _) in _COMMANDS.items():
        first_line = (options_type.__doc__ or "").partition("\n")[0]
        lines.append(f"  {command:<10}{first_line}")
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help lists a command's options.", ""])


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}: {' '.join(message.split())}\n")
    sys.exit(status)
