"""What a model says, taken apart: what it thinks, what it answers, and the tools it calls.

A chat template fixes how a model writes thoughts and calls; `MessageFormat.of` reads it off the
template. `MessageParser` takes the text as it comes and gives typed deltas. It reads one character
after another and decides by what it has read alone, so however a text is cut into pieces, the
deltas join to the same message. It holds back only what could still become markup.

    format = MessageFormat.of(tokenizer)
    parser = format.parser(prompt=tokenizer.decode(prompt_ids[-16:], False), reads_tools=True)
    for text in stream:
        for delta in parser.feed(text): ...
    for delta in parser.finish(): ...

A call is told as soon as its name is known and its arguments begin. What cannot be a call comes out
as content, to the last character. What turns out to be none only after it was told ends with
`is_complete=False`, and the rest of its text is content.

Markup may be control tokens, which have no text: give `MessageFormat.control_texts` to
`SamplingParams` so that the engine writes them out.
"""

from astrai_core.tokenizer.message_parsing.deltas import (
    ContentText,
    Delta,
    ParsedCall,
    ParsedMessage,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from astrai_core.tokenizer.message_parsing.markup import (
    CALL_BEGIN,
    CALL_END,
    CALLS_END,
    OPENERS,
    SEPARATOR,
    ToolStyle,
    Where,
)
from astrai_core.tokenizer.message_parsing.message_format import MessageFormat
from astrai_core.tokenizer.message_parsing.parser import MessageParser

__all__ = [
    "CALLS_END",
    "CALL_BEGIN",
    "CALL_END",
    "OPENERS",
    "SEPARATOR",
    "ContentText",
    "Delta",
    "MessageFormat",
    "MessageParser",
    "ParsedCall",
    "ParsedMessage",
    "ReasoningText",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "ToolStyle",
    "Where",
]
