"""A conversation on its way to the model, whatever the protocol: prompt, form, and how it is read.

Here meet what a client may ask of an answer - tools and which must be called, a form, thoughts or
none - and what the model's chat template can write. What the template cannot is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from astrai_core.generation import Structure
from astrai_core.tokenizer import AutoTokenizer
from astrai_core.tokenizer.message_parsing import MessageFormat, MessageParser, Where
from astrai_core.tokenizer.tool_grammar import Tool, ToolGrammar, after_thoughts
from astrai_serve.api.errors import InvalidRequestError

_PROMPT_END = 16  # tokens in which a generation prompt opens or closes thoughts
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True, kw_only=True)
class FunctionTool:
    """A function that the client can call for the model."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    """JSON schema of its arguments."""
    strict: bool = False
    """Arguments keep to the schema even where the model is free to call or not."""

    def to_template(self) -> dict[str, object]:
        """Return the tool as chat templates know it."""
        function: dict[str, object] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """Whether tools are called, and which."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] | None = None
    """Only these may be called; None stands for all."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How an answer is taken apart."""

    format: MessageFormat
    where: Where = "content"
    reads_tools: bool = False

    def parser(self) -> MessageParser:
        """A parser at the start of an answer."""
        return MessageParser(self.format, where=self.where, reads_tools=self.reads_tools)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the engine is given of a conversation."""

    ids: tuple[int, ...]
    structure: Structure | None
    reading: Reading


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages and what is asked of the answer."""

    messages: Sequence[Mapping[str, Any]]
    """As chat templates know them."""
    tools: Sequence[FunctionTool] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    structure: Structure | None = None
    """The form of the answer's text."""
    thinks: bool | None = None
    """Thoughts before the answer: wanted, unwanted, or as the template has it."""
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """More names for the template."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def prompt(self, tokenizer: AutoTokenizer) -> Prompt:
        """Render the messages and find out how the answer will be written.

        Raises:
            InvalidRequestError: the template cannot do it.
        """
        message_format = format_of(tokenizer)
        tools = self._offered_tools()
        if tools and message_format.tools is None:
            raise InvalidRequestError(
                "tools: this model's chat template has no calls of tools that this server can read",
                param="tools",
                code="unsupported_parameter",
            )
        ids = self._render(tokenizer, tools)
        continued = self._continued_text()
        end = tokenizer.decode(ids[-_PROMPT_END:], skip_special_tokens=False)
        where = message_format.where_after(end, continued)
        return Prompt(
            ids=tuple(ids),
            structure=self._form(message_format, tools, where == "thoughts"),
            reading=Reading(format=message_format, where=where, reads_tools=bool(tools)),
        )

    def _offered_tools(self) -> Sequence[FunctionTool]:
        """Those the model is told of: none where it may call none."""
        names = {tool.name for tool in self.tools}
        if len(names) < len(self.tools):
            raise InvalidRequestError("tools: two have the same name", param="tools")
        for name in self.tool_choice.names or ():
            if name not in names:
                raise InvalidRequestError(
                    f"tool_choice: {name[:60]!r} is none of the tools", param="tool_choice"
                )
        if self.tool_choice.mode == "required" and not self.tools:
            raise InvalidRequestError("tool_choice: there are no tools", param="tool_choice")
        return () if self.tool_choice.mode == "none" else self.tools

    def _form(
        self, message_format: MessageFormat, tools: Sequence[FunctionTool], opened: bool
    ) -> Structure | None:
        names = self.tool_choice.names
        callable_tools = [tool for tool in tools if names is None or tool.name in names]
        grammar = None
        if callable_tools:
            grammar = ToolGrammar(
                message_format,
                [Tool(name=tool.name, parameters=tool.parameters) for tool in callable_tools],
                opened_thoughts=opened,
            )
        parallel = self.parallel_tool_calls
        try:
            if grammar is not None and self.tool_choice.mode == "required":
                return grammar.forced(parallel=parallel)
            if grammar is not None and (
                self.structure is not None
                or not parallel
                or names is not None
                or any(tool.strict for tool in tools)
            ):
                return grammar.free(parallel=parallel, content=self.structure)
            if self.structure is not None and opened:
                return after_thoughts(self.structure, message_format)
        except ValueError as error:
            raise InvalidRequestError(str(error), param="response_format") from None
        return self.structure

    def _render(self, tokenizer: AutoTokenizer, tools: Sequence[FunctionTool]) -> list[int]:
        if tokenizer.chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message goes on with the last message; give "
                "add_generation_prompt: false with it",
                param="continue_final_message",
            )
        for name in self.variables:
            if name in _RESERVED:
                raise InvalidRequestError(
                    f"chat_template_kwargs: {name} is a parameter of its own",
                    param="chat_template_kwargs",
                )
        try:
            return tokenizer.apply_chat_template(
                self.messages,
                self.add_generation_prompt,
                [tool.to_template() for tool in tools] or None,
                continue_final_message=self.continue_final_message,
                **{**self._thinking_variables(tokenizer), **self.variables},
            )
        except ValueError as error:
            raise InvalidRequestError(str(error), param="messages") from error

    def _thinking_variables(self, tokenizer: AutoTokenizer) -> dict[str, object]:
        """The wish for thoughts, by the name the template has for it."""
        if self.thinks is None or tokenizer.chat_template is None:
            return {}
        names = ("enable_thinking", "thinking")
        if "reasoning_effort" in tokenizer.chat_template.source:
            return {}  # which is a variable already
        known = [name for name in names if _has_name(tokenizer.chat_template.source, name)]
        if not known and (self.thinks or format_of(tokenizer).thoughts is not None):
            raise InvalidRequestError(
                "reasoning_effort: this model's chat template cannot switch thinking "
                f"{'on' if self.thinks else 'off'}",
                param="reasoning_effort",
                code="unsupported_parameter",
            )
        return dict.fromkeys(known[:1], self.thinks)

    def _continued_text(self) -> str | None:
        if not self.continue_final_message:
            return None
        content = self.messages[-1].get("content")
        return content if isinstance(content, str) else ""


@lru_cache(maxsize=8)
def format_of(tokenizer: AutoTokenizer) -> MessageFormat:
    """How a model writes messages."""
    return MessageFormat.of(tokenizer)


def _has_name(source: str, name: str) -> bool:
    """Whether a template reads a variable, and not only a key of messages."""
    return any(f"{before}{name}" in source for before in ("if ", "not ", "and ", "or ", "{{ "))
