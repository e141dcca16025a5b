"""A chat template: messages in, one string out, in a sandbox that a hostile folder cannot stall.

Templates come with downloaded model folders, so they are untrusted code. Jinja's sandbox keeps them
from Python's internals but not from looping for ever or building a string of a terabyte; the limits
below do. They bound steps, time, the size of every value a template can grow, and the sum of them
all. A list counts as what it would print: nested in itself thirty times over, it prints for ever.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property, wraps
from string import Formatter
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that an assistant's message may give what it thought before its answer."""

MAX_STEPS = 200_000
MAX_SECONDS = 3.0
MAX_CHARACTERS = 8_000_000
_MAX_TOTAL = 25 * MAX_CHARACTERS
_MAX_ITEMS = 200_000
_MAX_BITS = 4096
_MAX_WIDTH = 100_000

_ARGUMENTS_TO_JSON = re.compile(r"""arguments['"]?\]?\s*\|\s*tojson""")


class ChatTemplate:
    """A Jinja chat template in the dialect of Hugging Face folders.

    Args:
        source: the template's text.

    Raises:
        ValueError: the text is not a template.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise ValueError("chat template is nested too deeply") from None

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the template's text."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """Write calls of tools in messages as this template wants to read them.

        A call is `{"type": "function", "function": {"name", "arguments"}}`, or its inner part
        alone. Arguments come as an object or, from OpenAI's clients, as JSON; templates that paste
        them get JSON, and those that write JSON themselves get the object.
        """
        return [_with_calls(message, self._pastes_arguments) for message in messages]

    @cached_property
    def _pastes_arguments(self) -> bool:
        return "arguments" in self.source and not _ARGUMENTS_TO_JSON.search(self.source)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> str:
        """Write the conversation as the model was trained to read it.

        Keys of a message that are None count as absent. What an assistant thought is found under
        `reasoning_content` and `thinking`, whichever of `REASONING` the message calls it.

        Raises:
            ValueError: there is no message, the template refuses them, or it breaks a limit.
        """
        if not messages:
            raise ValueError("messages is empty: a chat needs at least one message")
        present = [_with_reasoning(message) for message in self.prepare(messages)]
        token = _BUDGET.set(_Budget())
        try:
            pieces: list[str] = []
            size = 0
            for piece in self._template.generate(
                messages=present,
                **{
                    "tools": list(tools) if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **variables,
                },
            ):
                size += len(piece)
                _check_size(size)
                pieces.append(piece)
            return "".join(pieces)
        except _Refusal as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        except _LimitError as error:
            raise ValueError(f"the chat template asks for {error}") from None
        except RecursionError:
            raise ValueError("chat template recurses without end") from None
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(f"chat template failed: {type(error).__name__}: {error}") from None
        finally:
            _BUDGET.reset(token)


def _with_reasoning(message: Message) -> dict[str, Any]:
    present = {key: value for key, value in message.items() if value is not None}
    thought = next((present[key] for key in REASONING if key in present), None)
    if thought is None:
        return present
    return {"thinking": thought, **present, "reasoning_content": thought}


def _with_calls(message: Message, as_text: bool) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    return {**message, "tool_calls": [_prepared_call(call, as_text) for call in calls]}


def _prepared_call(call: object, as_text: bool) -> object:
    if not isinstance(call, Mapping):
        return call
    outer = call if "function" in call else {"type": "function", "function": call}
    function = outer["function"]
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments") or {}
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        arguments = _read_object(arguments)
    return {**outer, "function": {**function, "arguments": arguments}}


def _read_object(text: str) -> object:
    """The JSON object in a text; the text itself where it holds none that could be written."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # half a surrogate pair is no text
        return text
    return value if isinstance(value, dict) else text


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class _LimitError(jinja2.TemplateError):
    """The template asked for more than a template may."""


class _Budget:
    """What one rendering has left."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.characters = _MAX_TOTAL
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        """Take one step of a loop."""
        self.steps -= 1
        if self.steps < 0:
            raise _LimitError(f"more than {MAX_STEPS} loop steps")
        self.check_time()

    def build(self, value: object) -> None:
        """Account for a value that the template made."""
        size = _measure(value) if isinstance(value, _SIZED) else 0
        _check_size(size)
        self.characters -= size
        if self.characters < 0:
            raise _LimitError(f"values of more than {_MAX_TOTAL} characters together")
        self.check_time()

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise _LimitError(f"more than {MAX_SECONDS:.0f} seconds")


_BUDGET: ContextVar[_Budget] = ContextVar("chat_template_budget")


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise _LimitError(f"a value of more than {MAX_CHARACTERS} characters")


_SIZED = str | list | tuple | dict


def _measure(value: object) -> int:
    """Characters of all text in a value, as often as it stands there."""
    if isinstance(value, str):
        return len(value)
    total, items, waiting = 0, 0, [value]
    while waiting:
        item = waiting.pop()
        items += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        if items + len(waiting) > _MAX_ITEMS:
            raise _LimitError(f"a value of more than {_MAX_ITEMS} items")
    return total


class _Generation(Extension):
    """`{% generation %}` marks what the model says; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


# Names that no template can write, so that none can shadow them. As filters they are called by the
# compiled template itself, not through the sandbox's checks of what a template calls: a chat is
# rendered and encoded in two thirds of the time.
_STEP, _BUILT = "=step", "=built"


def _weave_limits(template: nodes.Template) -> nodes.Template:
    """Count each loop step and macro call, and measure each value that is put together."""
    for body in [node.body for node in template.find_all((nodes.For, nodes.Macro))]:
        body.insert(0, nodes.ExprStmt(_woven(_STEP, nodes.Const(None)), lineno=1))
    _wrap_values(template)
    return template


def _wrap_values(node: nodes.Node) -> None:
    for name, value in list(node.iter_fields()):
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _wrap_values(child)
            is_stored = isinstance(node, nodes.Assign) and name == "node"
            if isinstance(child, nodes.Expr) and (is_stored or _is_putting_together(child)):
                children[index] = _woven(_BUILT, child)
        if not isinstance(value, list):
            setattr(node, name, children[0])


def _woven(name: str, value: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


# with a context, so that neither is worked out once for all when a template is compiled


@jinja2.pass_context
def _step(context: Context, value: object) -> None:
    del context, value
    _BUDGET.get().step()


@jinja2.pass_context
def _built(context: Context, value: object) -> object:
    del context
    _BUDGET.get().build(value)
    return value


def _is_putting_together(node: nodes.Expr) -> bool:
    if isinstance(node, nodes.Tuple) and node.ctx != "load":
        return False
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Slice)
    return isinstance(node, nodes.Concat | nodes.List | nodes.Tuple | nodes.Dict)


class _TemplateEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _weave_limits(super()._parse(source, name, filename))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (max(right, 1) if operator == "**" else 1)
            if operator != "%" and bits + right.bit_length() > _MAX_BITS:
                raise _LimitError(f"a number of more than {_MAX_BITS} bits")
        elif operator == "*":
            _check_size(_length(left) * max(0, right) if isinstance(right, int) else 0)
            _check_size(_length(right) * max(0, left) if isinstance(left, int) else 0)
        elif operator == "+":
            _check_size(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            _check_percent_format(left)
        result = super().call_binop(context, operator, left, right)
        _BUDGET.get().build(result)
        return result

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Check what a string method could grow to before calling it."""
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            _check_growth(obj.__name__, owner, [*args, *kwargs.values()])
        result = super().call(context, obj, *args, **kwargs)
        _BUDGET.get().build(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Check field widths where Jinja takes the format method into its own hands."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_brace_format(str(value.__self__))
        return wrapped


def _length(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _check_widths(values: Iterable[object]) -> None:
    """Refuse to pad without measure."""
    if any(isinstance(value, int) and abs(value) > _MAX_WIDTH for value in values):
        raise _LimitError(f"a width of more than {_MAX_WIDTH}")


def _check_percent_format(text: str) -> None:
    if re.search(r"%(\([^)]*\))?[-#0 +]*(\*|\d{6}|\d*\.(\*|\d{6}))", text):
        raise _LimitError("a field width that is computed or too large")


def _check_brace_format(text: str) -> None:
    for _, _, spec, _ in Formatter().parse(text):
        if spec and re.search(r"\{|\d{6}", spec):
            raise _LimitError("a field width that is computed or too large")


def _check_growth(name: str, owner: str, args: Sequence[Any]) -> None:
    if name == "replace" and len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        _check_size(len(owner) + owner.count(old) * len(new))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _check_size(sum(_length(part) + len(owner) for part in args[0]))
    elif name in {"center", "ljust", "rjust", "zfill", "expandtabs"}:
        _check_widths(args)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with its numbers and its growth checked first."""

    @wraps(function)  # copies the marks by which Jinja knows that a filter wants its context
    def bounded(*args: Any, **kwargs: Any) -> Any:
        passed = 1 if hasattr(function, "jinja_pass_arg") else 0
        value, *rest = args[passed:]
        options = [*rest, *kwargs.values()]
        if name == "join":
            value = list(value)
            _check_growth(name, str(options[0]) if options else "", [value])
        elif name == "replace":
            _check_growth(name, str(value), options)
        elif name == "format":
            _check_percent_format(str(value))
        else:
            _check_widths(options)
        result = function(*args[:passed], value, *rest, **kwargs)
        _BUDGET.get().build(result)
        return result

    return bounded


@jinja2.pass_context  # so that it is not called on constants, before there is a budget
def _printed(context: Context, value: object) -> str:
    """What `{{ value }}` writes, also into blocks that become a value again."""
    del context
    text = str(value)
    _BUDGET.get().build(text)
    return text


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if not ensure_ascii:
        return text
    # Private-use characters stay: they stand in for control tokens and are given back later.
    escape = re.compile(r"[^\x00-\x7f\U000f0000-\U0010ffff]")
    return escape.sub(lambda match: json.dumps(match.group())[1:-1], text)


def _strftime_now(format: str) -> str:  # noqa: A002 - the name templates may use
    return datetime.now().strftime(format)


def _environment() -> _TemplateEnvironment:
    environment = _TemplateEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        finalize=_printed,
        extensions=[_Generation, LoopControlExtension],
    )
    environment.filters.update({n: _bounded(n, f) for n, f in environment.filters.items()})
    environment.filters["tojson"] = _bounded("tojson", _tojson)
    environment.filters |= {_STEP: _step, _BUILT: _built}
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()
