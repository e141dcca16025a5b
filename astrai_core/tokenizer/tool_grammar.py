"""Grammars that make a model call a tool, or call at most one, in the words of its own format.

They are in Lark's notation as llguidance reads it: `%json` is a JSON schema, `<[7]>` a token id.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astrai_core.generation import Structure
from astrai_core.tokenizer.message_parsing import (
    CALL_BEGIN,
    CALL_END,
    CALLS_END,
    OPENERS,
    SEPARATOR,
    MessageFormat,
    ToolStyle,
)

# a small model would write white space without end; and nothing of a schema is silently left out
_JSON_OPTIONS = {
    "whitespace_pattern": r"( |\n[ \t]{0,12})",
    "lenient": False,
    "coerce_one_of": False,
}
_COMMA = '", "'


@dataclass(frozen=True, kw_only=True)
class Tool:
    """What can be called."""

    name: str
    parameters: Mapping[str, Any] | None = None
    """JSON schema of the arguments; None takes any object."""


class ToolGrammar:
    """Writes grammars for calls of these tools.

    Args:
        format: how the model writes calls; `format.tools` must be known.
        tools: what can be called, at least one.
        opened_thoughts: the prompt has opened the thoughts, so the model closes them first.
    """

    def __init__(
        self,
        format: MessageFormat,  # noqa: A002 - the word that fits
        tools: Sequence[Tool],
        *,
        opened_thoughts: bool = False,
    ):
        assert format.tools is not None, "the format of calls is not known"
        assert tools, "there is nothing to call"
        self._format = format
        self._style: ToolStyle = format.tools
        self._tools = tools
        self._opened_thoughts = opened_thoughts
        self._ids = {text: token_id for token_id, text in format.control_texts}

    def forced(self, *, parallel: bool) -> Structure:
        """The answer is calls and nothing else: one, or with `parallel` one or more."""
        opener = "" if self._style == "llama" else self._mark(OPENERS[self._style])
        return self._structure(f"{opener} {self._calls(parallel)}", [])

    def free(self, *, parallel: bool, content: Structure | None = None) -> Structure:
        """The answer is text, calls, or calls after text; arguments keep to their schemas.

        Args:
            parallel: more calls than one may be made.
            content: the form of the text; then the answer is such text, or calls.

        Raises:
            ValueError: the form is of a kind that cannot be one of two.
        """
        opener, calls = OPENERS[self._style], self._calls(parallel)
        if content is not None:
            mark = "" if self._style == "llama" else self._mark(opener)
            return self._structure(f"form | {mark} {calls}", [f"form: {_form_rule(content)}"])
        if self._style == "llama":  # bare calls, at the very start; later they are but text
            start = f"TEXT | {calls}"
            no_call = r"~/(?s:\s*\{\s*\x22name\x22.*)/"
            rules = [f"TEXT: /(?s:.*)/ & {no_call} & ~/(?s:.*{_pattern(opener)}.*)/"]
        elif opener in self._ids:
            start = f"TEXT | TEXT {self._mark(opener)} {calls}"
            rules = ["TEXT: /(?s:.*)/"]  # text cannot spell a control token
        else:
            start = f"TEXT | before {calls}"
            rules = [
                f"TEXT: /(?s:.*)/ & ~/(?s:.*{_pattern(opener)}.*)/",
                f"before[suffix={_literal(opener)}]: /(?s:.*)/",
            ]
        return self._structure(start, rules)

    def _structure(self, start: str, rules: list[str]) -> Structure:
        for n, tool in enumerate(self._tools):
            rules += [f"call_{n}: {self._call(n, tool)}", f"args_{n}: {json_rule(tool.parameters)}"]
        rules.append("call: " + " | ".join(f"call_{n}" for n in range(len(self._tools))))
        if self._opened_thoughts:
            thoughts, more = _rest_of_thoughts(self._format)
            start, rules = f"{thoughts} ({start})", [*rules, *more]
        return Structure(grammar="\n".join([f"start: {start}", *rules]))

    def _calls(self, parallel: bool) -> str:
        """What follows the opener."""

        def one_or_more(one: str, between: str = "") -> str:
            return f"{one} ({between} {one})*" if parallel else one

        match self._style:
            case "hermes":
                opener, end = (self._mark(tag) for tag in (OPENERS["hermes"], "</tool_call>"))
                return one_or_more(f'"\\n" call "\\n" {end}', f'"\\n" {opener}')
            case "llama":
                return one_or_more("call", '"; "')
            case "mistral":
                return f'" [" {one_or_more("call", _COMMA)} "]"'
            case "mistral_named":
                return one_or_more("call", self._mark(OPENERS["mistral_named"]))
            case "deepseek" | "deepseek_fenced":
                one = f"{self._mark(CALL_BEGIN)} call {self._mark(CALL_END)}"
                between = '"\\n"' if self._style == "deepseek_fenced" else ""
                return f"{one_or_more(one, between)} {self._mark(CALLS_END)}"

    def _call(self, n: int, tool: Tool) -> str:
        name = json.dumps(tool.name, ensure_ascii=False)
        match self._style:
            case "hermes" | "mistral":
                begin = _literal(f'{{"name": {name}, "arguments": ')
                return f'{begin} args_{n} "}}"'
            case "llama":
                begin = _literal(f'{{"name": {name}, "parameters": ')
                return f'{begin} args_{n} "}}"'
            case "mistral_named":
                return f"{_literal(tool.name)} {self._mark('[ARGS]')} args_{n}"
            case "deepseek":
                return f"{_literal(tool.name)} {self._mark(SEPARATOR)} args_{n}"
            case "deepseek_fenced":
                fence = _literal(tool.name + "\n```json\n")
                return f'"function" {self._mark(SEPARATOR)} {fence} args_{n} "\\n```"'

    def _mark(self, text: str) -> str:
        return f"<[{self._ids[text]}]>" if text in self._ids else _literal(text)


def after_thoughts(
    form: Structure,
    format: MessageFormat,  # noqa: A002 - the word that fits
) -> Structure:
    """The form of an answer whose thoughts the prompt has opened: they are closed first.

    Raises:
        ValueError: the form is of a kind that cannot be put behind something else.
    """
    rule = _form_rule(form)
    thoughts, rules = _rest_of_thoughts(format)
    return Structure(grammar="\n".join([f"start: {thoughts} form", f"form: {rule}", *rules]))


def _form_rule(form: Structure) -> str:
    """The right side of a rule for a form.

    Raises:
        ValueError: the form is no JSON and no choice.
    """
    if form.json_schema is not None:
        return json_rule(json.loads(form.json_schema))
    if form.choice is not None:
        return " | ".join(map(_literal, form.choice))
    kind = "regex" if form.regex is not None else "grammar"
    raise ValueError(
        f"{kind} cannot be kept by an answer that may think or call tools before; switch that off, "
        "or give a JSON schema or choices"
    )


def _rest_of_thoughts(
    format: MessageFormat,  # noqa: A002 - the word that fits
) -> tuple[str, list[str]]:
    """The rest of thoughts that are open and their end, as part of a rule, and rules it needs."""
    assert format.thoughts is not None
    closer = format.thoughts[1]
    ids = {text: token_id for token_id, text in format.control_texts}
    gap = "GAP: /\\n{1,2}/"
    if closer in ids:
        return f"THOUGHT <[{ids[closer]}]> GAP?", ["THOUGHT: /(?s:.*)/", gap]
    return "thought GAP?", [f"thought[suffix={_literal(closer)}]: /(?s:.*)/", gap]


def json_rule(schema: Mapping[str, Any] | bool | None) -> str:
    """The right side of a rule for JSON of a schema; any object without one."""
    whole = {"type": "object"} if schema is None else schema
    if isinstance(whole, Mapping):
        whole = {**whole, "x-guidance": _JSON_OPTIONS}
    return f"%json {json.dumps(whole)}"


def _literal(text: str) -> str:
    """A string of Lark: JSON's escapes are its own."""
    return json.dumps(text, ensure_ascii=False)


def _pattern(text: str) -> str:
    """A regular expression for this very text."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):x}}}" for c in text)
