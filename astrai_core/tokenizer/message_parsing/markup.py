"""How models mark thoughts and calls of tools."""

from typing import Literal, Protocol

ToolStyle = Literal["hermes", "llama", "mistral", "mistral_named", "deepseek", "deepseek_fenced"]
"""How calls are written, NAME and {} being what they call and with what:

hermes           <tool_call>\\n{"name": NAME, "arguments": {}}\\n</tool_call>, also Qwen's
llama            {"name": NAME, "parameters": {}}, bare or after <|python_tag|>, joined by ;
mistral          [TOOL_CALLS] [{"name": NAME, "arguments": {}}, ...]
mistral_named    [TOOL_CALLS]NAME[ARGS]{}, since version 11 of its tokenizers
deepseek         <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{}<｜tool▁call▁end｜>, since V3.1
deepseek_fenced  with the word `function` as NAME, then NAME and {} in a fence of JSON; V3, R1

The parser tells the two of Mistral, and the two of DeepSeek, apart as it reads.
"""
Where = Literal["start", "thoughts", "content"]
"""Where an answer begins: thoughts may be opened, are open, or are over."""
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
SPACE = " \t\r\n"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
CALLS_END, SEPARATOR = "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>"
OPENERS: dict[ToolStyle, str] = {
    "hermes": "<tool_call>",
    "llama": "<|python_tag|>",
    "mistral": "[TOOL_CALLS]",
    "mistral_named": "[TOOL_CALLS]",
    "deepseek": "<｜tool▁calls▁begin｜>",
    "deepseek_fenced": "<｜tool▁calls▁begin｜>",
}
MARKUP = frozenset(
    {*OPENERS.values(), "</tool_call>", "[ARGS]", "[CALL_ID]"}
    | {CALL_BEGIN, CALL_END, CALLS_END, SEPARATOR}
    | {tag for pair in THOUGHTS for tag in pair}
)


class Markup(Protocol):
    """What the parser has to know of a model; a `MessageFormat`."""

    @property
    def thoughts(self) -> tuple[str, str] | None:
        """What opens and closes them."""
        ...

    @property
    def tools(self) -> ToolStyle | None:
        """How calls are written."""
        ...
