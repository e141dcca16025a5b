"""What jsonargparse says of a wrong option, on a screen, as one line that a person can act on."""

import re
from dataclasses import dataclass, field

_KEY = re.compile(r'Parser key "([\w.]+)":')
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':")
_REFUSED = re.compile(r"Option '(\w+)' is not accepted")
_UNKNOWN = re.compile(r"Unrecognized arguments: (.+)")
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
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}


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
            self.kind = found[1].rpartition(".")[2]
        elif found := _REFUSED.match(line):
            self.causes.append(f"{self.option}.{found[1]} is not an option of {self.kind}")
        elif found := _UNKNOWN.match(line):
            self.causes.append(self._unknown(found[1].split()[0]))
        elif found := _REQUIRED.match(line):
            self.causes.append(f"--{found[1]} is required")
        elif found := _NO_CLASS.match(line):
            self.causes.append(f"{self.option}: there is no class {found[1]} for it")
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
        inner = [*self.path, name.lstrip("-")]
        return f"unknown option --{'.'.join(inner)}"


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


def _wording(kind: str) -> str:
    if kind.startswith("typing.Literal"):
        choices = kind.removeprefix("typing.Literal[").removesuffix("]").replace("'", "")
        return "one of " + choices
    name = kind.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return _WORDS.get(name, f"a {name}")
