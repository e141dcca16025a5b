"""What jsonargparse says of a wrong option, on a screen, as one line that a person can act on."""

import functools
import inspect
import re
from dataclasses import dataclass, field
from pydoc import locate

from astrai_core.nearest_name import did_you_mean

_KEY = re.compile(r'Parser key "([\w.]+)":')
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':")
_REFUSED = re.compile(r"Option '(\w+)[\w.]*' is not accepted")
_NOT_OF_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '(\w+)")
_UNKNOWN = re.compile(r"Unrecognized arguments: (.+)")
_NOT_OF_COMMAND = re.compile(r"Subcommand '\w+' does not accept option '([\w.]+)'")
_REQUIRED = re.compile(r"Option '(?:\w+\.)?(\w+)' is required")
_EXPECTED = re.compile(
    r"Expected an? (<class '[\w.]+'>|typing\.Literal\[.*?\])(?:\. Got value: (.*))?"
)
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_VALUE = re.compile(r"argument (--[\w.]+): expected one argument")
_GIVEN = re.compile(r"Given value: (.*)")
_NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:|Given value type: |Expected a path but "
)
_SECTIONS = {
    "trainer": "lightning.pytorch.Trainer",
    "checkpoint": "astrai_train.callbacks.checkpoint.FolderCheckpoint",
}
_CLASSES = {"--model": "astrai_train.modules", "--data": "astrai_train.data.module"}
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
# of a class's many options one or another is always a little alike
_nearest = functools.partial(did_you_mean, cutoff=0.7)


@dataclass
class _Reading:
    path: list[str] = field(default_factory=list)
    kind: str = ""
    causes: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    given: str = ""

    @property
    def option(self) -> str:
        return "--" + ".".join(self.path)

    def read(self, line: str) -> None:
        if found := _KEY.match(line):
            self.path.append(found[1])
        elif found := _CLASS.match(line):
            self.kind = found[1]
        elif found := _REFUSED.match(line):
            kind = self.kind.rpartition(".")[2]
            hint = _nearest(found[1], _options_of(self.kind))
            self.causes.append(f"{self.option}.{found[1]} is not an option of {kind}{hint}")
        elif found := _NOT_OF_GROUP.match(line):
            hint = _nearest(found[2], _options_of_group(self.kind, found[1]))
            self.causes.append(f"{self.option}.{found[1]} has no option {found[2]}{hint}")
        elif found := _NOT_OF_COMMAND.match(line):
            self.causes.append(self._unknown(f"--{found[1]}"))
        elif found := _UNKNOWN.match(line):
            self.causes.append(self._unknown(found[1].split()[0]))
        elif found := _REQUIRED.match(line):
            self.causes.append(f"--{found[1]} is required")
        elif found := _NO_CLASS.match(line):
            hint = _nearest(found[1], _classes_for(self.option))
            self.causes.append(f"{self.option}: there is no class {found[1]} for it{hint}")
        elif found := _NO_VALUE.match(line):
            self.causes.append(f"{found[1]} needs a value")
        elif found := _EXPECTED.match(line):
            self.expected.append(_wording(found[1]))
            self.given = found[2] or self.given
        elif found := _GIVEN.match(line):
            if not self.given and not re.match(r"Namespace\(|NestedArg\(", found[1]):
                self.given = found[1]
        elif line and not _NOISE.match(line):
            self.causes.append(line)

    def _unknown(self, argument: str) -> str:
        name = argument.partition("=")[0]
        if not name.startswith("-"):
            return f"{name} is not an option; options start with --"
        inner = ".".join([*self.path, name.lstrip("-")])
        section, _, last = inner.partition(".")
        hint = _nearest(last, _options_of(_SECTIONS.get(section, "")), prefix=f"--{section}.")
        return f"unknown option --{inner}{hint}"


def explain(message: str) -> str:
    """Return the one cause that matters.

    Args:
        message: of an `ArgumentError`, or of a `ValueError` raised while classes are made.
    """
    reading = _Reading()
    for line in message.splitlines():
        reading.read(line.strip().removeprefix("- "))
    if reading.causes:
        return "; ".join(dict.fromkeys(reading.causes))
    wanted = [word for word in dict.fromkeys(reading.expected) if word != "null"]
    if wanted and reading.path:
        value = f", not {reading.given}" if reading.given else ""
        return f"{reading.option} must be {' or '.join(wanted)}{value}"
    return " ".join(message.split())


def _options_of(path: str) -> list[str]:
    """What a class takes, its parents' options included."""
    found = locate(path) if path else None
    if not inspect.isclass(found):
        return []
    parents = (vars(parent).get("__init__") for parent in inspect.getmro(found))
    taken = (inspect.signature(init).parameters for init in parents if inspect.isfunction(init))
    return [name for names in taken for name in names if name not in ("self", "args", "kwargs")]


def _options_of_group(path: str, group: str) -> list[str]:
    """What the class of a class's argument takes, as `SEQModule`'s optimizer."""
    found = locate(path)
    for parent in inspect.getmro(found) if inspect.isclass(found) else ():
        kind = inspect.get_annotations(parent.__init__, eval_str=True).get(group)
        for one in (kind, *getattr(kind, "__args__", ())):
            if inspect.isclass(one) and one is not type(None):
                return _options_of(f"{one.__module__}.{one.__qualname__}")
    return []


def _classes_for(option: str) -> list[str]:
    module = locate(_CLASSES.get(option, "")) if option in _CLASSES else None
    return [name for name, one in vars(module).items() if inspect.isclass(one)] if module else []


def _wording(kind: str) -> str:
    if kind.startswith("typing.Literal"):
        choices = kind.removeprefix("typing.Literal[").removesuffix("]").replace("'", "")
        return "one of " + choices
    name = kind.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return _WORDS.get(name, f"a {name}")
