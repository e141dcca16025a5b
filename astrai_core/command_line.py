"""Options from dataclasses: a field is an option, the string under it its help.

An option is taken with dashes as with underscores, a switch without its `true`, and a list as the
values that follow its name. What is wrong is said in one line that names the option, the value and
the way out.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import os
import re
import sys
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser, set_parsing_settings

from astrai_core.nearest_name import did_you_mean

First = TypeVar("First")
Second = TypeVar("Second")

_KEY = re.compile(r'Parser key "(\w+)"')
_REQUIREMENT = re.compile(r"([\w.-]+).*; extra == .(\w+)")
_VALUE = re.compile(r"(?:Got value|Given value): (.*)")
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    bool: "true, false",
}
_NEXT = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.ENOMEM: "close other programs, or take a smaller model",
    errno.EFBIG: "raise the limit (ulimit -f) and run the same command again",
    errno.EACCES: "choose another place, or become its owner",
    errno.EPERM: "choose another place, or become its owner",
    errno.EROFS: "choose another place",
    errno.EEXIST: "a file has the name of a folder; choose another place",
    errno.ENOTDIR: "a file has the name of a folder; choose another place",
    errno.EISDIR: "name a file",
    errno.ENOENT: "check the path",
}


class CommandLineError(ValueError):
    """The options given cannot be understood; the message is one line for the user."""


def parse(
    arguments: Sequence[str],
    program: str,
    first: type[First],
    second: type[Second],
    operand: str | None = None,
) -> tuple[First, Second]:
    """Read options into two dataclasses; the docstring of the first describes the program.

    Args:
        arguments: what the user wrote.
        program: name in help and errors.
        first: takes values; its docstring describes the program.
        second: takes more values.
        operand: a field of the first, of type Path, that is written without a name.

    Raises:
        CommandLineError: an option is unknown, missing or has no such value.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=program, exit_on_error=False, description=first.__doc__)
    kinds = typing.get_type_hints(first) | typing.get_type_hints(second)
    if operand is not None:
        _add_operand(parser, first, operand)
    parser.add_class_arguments(first, as_group=False, skip={operand} if operand else None)
    if dataclasses.fields(second):  # pyright: ignore[reportArgumentType]
        parser.add_class_arguments(second)
    try:
        values = vars(parser.parse_args(_normalized(arguments, kinds)))
        return _build(first, values), _build(second, values)
    except ArgumentError as error:
        if operand is not None and f"'{operand}' is required" in str(error):
            raise CommandLineError(
                f"which {operand}? {program} DIR ({program} --help says more)"
            ) from None
        raise CommandLineError(_line(str(error), kinds, program)) from None
    except ValueError as error:
        raise CommandLineError(str(error)) from None


def parse_one(
    arguments: Sequence[str], program: str, options: type[First], operand: str | None = None
) -> First:
    """Read options into one dataclass.

    Args:
        arguments: what the user wrote.
        program: name in help and errors.
        options: takes the values.
        operand: the field that is written without a name, as in `info DIR`.

    Raises:
        CommandLineError: an option is unknown, missing or has no such value.
    """
    return parse(arguments, program, options, _Nothing, operand)[0]


def told(error: BaseException) -> str:
    """What to tell the user: one line, which for errors of the system names file and way out."""
    if isinstance(error, OSError) and error.errno in _NEXT:
        # of a copy the second name is the one that is written; what HDF5 adds is of use to nobody
        file = error.filename2 or error.filename
        reason = os.strerror(error.errno)
        return f"{f'{file}: {reason}' if file else reason}; {_NEXT[error.errno]}"
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def needs_extra(program: str, extra: str) -> Iterator[None]:
    """End the program in one line if a package is missing that an extra of ours brings.

    Args:
        program: named in the line.
        extra: the one to install, where several bring the package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extras = _extras_with(package)
        if not extras:
            raise
        chosen = extra if extra in extras else extras[0]
        sys.stderr.write(
            f"{program}: the package {package} is not installed; install what this command needs: "
            f"pip install 'astrai[{chosen}]'\n"
        )
        sys.exit(1)


def _extras_with(package: str) -> list[str]:
    """The extras of this distribution that bring a package, by its name in `import`."""
    found = (_REQUIREMENT.match(line) for line in importlib.metadata.requires("astrai") or ())
    return [one[2] for one in found if one and one[1].replace("-", "_") == package]


@dataclasses.dataclass
class _Nothing:
    pass


def _add_operand(parser: ArgumentParser, options: type, name: str) -> None:
    told = {param.arg_name: param.description for param in parse_from_object(options).params}
    parser.add_argument(name, type=Path, metavar="DIR", help=told[name])


def _build(kind: type[First], values: dict[str, object]) -> First:
    fields = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    return kind(**{field.name: values[field.name] for field in fields})


def _normalized(arguments: Sequence[str], kinds: dict[str, object]) -> list[str]:
    result: list[str] = []
    lists: dict[str, list[str]] = {}
    filling: list[str] | None = None
    for position, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = name[2:].replace("-", "_")
            argument = f"--{name}{equals}{value}"
            filling = None
            if typing.get_origin(kinds.get(name)) is list:
                filling = lists.setdefault(name, [])
                filling += [value] if equals else []
                continue
            following = arguments[position + 1 : position + 2]
            if kinds.get(argument[2:]) is bool and following not in (["true"], ["false"]):
                argument += "=true"
        elif filling is not None:
            filling.append(argument)
            continue
        result.append(argument)
    return result + [f"--{name}={json.dumps(values)}" for name, values in lists.items() if values]


def _line(message: str, kinds: dict[str, object], program: str) -> str:
    if found := re.match(r"Unrecognized arguments: (\S+)", message):
        given = found[1]
        if not given.startswith("-"):
            return f"{given} is not an option; options start with -- ({program} --help lists them)"
        name = given.lstrip("-").partition("=")[0].replace("-", "_")
        hint = did_you_mean(name, kinds, prefix="--", cutoff=0.5)
        return f"unknown option {given}{hint} ({program} --help lists all)"
    if found := re.match(r"Option '(\w+)' is required", message):
        return f"--{found[1]} is required ({program} --help lists all options)"
    if found := _KEY.match(message):
        values = _VALUE.findall(message)
        value = f", not {values[-1]}" if values else ""
        return f"--{found[1]} must be {_wording(kinds[found[1]])}{value}"
    if found := re.match(r"argument (--\w+).*expected one argument", message):
        return f"{found[1]} needs a value"
    return " ".join(message.split())


def _wording(kind: object) -> str:
    """Say what values a type has."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return f"one or more of: {_wording(typing.get_args(kind)[0])}"
    # of a Literal and None, `|` makes what typing.Union does
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        members = [one for one in typing.get_args(kind) if one is not type(None)]
        return " or ".join([*map(_wording, members), "null"])
    return _WORDS.get(kind, str(kind)) if isinstance(kind, type) else str(kind)
