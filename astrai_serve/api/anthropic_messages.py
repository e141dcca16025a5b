"""The turns of Anthropic's conversations, and what chat templates are told of them."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from astrai_serve.api.openai_parameters import Body


class TextPart(Body):
    """A block of text."""

    type: Literal["text"]
    text: str


class ThinkingPart(Body):
    """What the model thought before."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingPart(Body):
    """Thoughts that only their author can read; they are left out."""

    type: Literal["redacted_thinking"]


class ToolUsePart(Body):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object]


class ToolResultPart(Body):
    """What a call came to."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextPart] | None = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        """The result as the model reads it."""
        text = self.content if isinstance(self.content, str) else join_texts(self.content or ())
        return f"Error: {text}" if self.is_error else text


class UserTurn(Body):
    """What a person, or a tool, says."""

    role: Literal["user"]
    content: str | list[Annotated[TextPart | ToolResultPart, Field(discriminator="type")]]


class AssistantTurn(Body):
    """What the model said."""

    role: Literal["assistant"]
    content: (
        str
        | list[
            Annotated[
                TextPart | ThinkingPart | RedactedThinkingPart | ToolUsePart,
                Field(discriminator="type"),
            ]
        ]
    )


class SystemTurn(Body):
    """An instruction within the conversation."""

    role: Literal["system"]
    content: str | list[TextPart]


Turn = UserTurn | AssistantTurn | SystemTurn


def join_texts(parts: Iterable[TextPart]) -> str:
    """The text of some parts, each beginning a line."""
    return "\n".join(part.text for part in parts)


def to_template(turns: Sequence[Turn]) -> list[dict[str, object]]:
    """Return turns as chat templates know them: results of tools are messages of their own."""
    messages: list[dict[str, object]] = []
    names: dict[str, str] = {}
    for turn in turns:
        parts = (
            [TextPart(type="text", text=turn.content)]
            if isinstance(turn.content, str)
            else turn.content
        )
        texts = join_texts(part for part in parts if isinstance(part, TextPart))
        match turn:
            case AssistantTurn():
                calls = [part for part in parts if isinstance(part, ToolUsePart)]
                names |= {call.id: call.name for call in calls}
                messages.append(_assistant(texts, parts, calls))
            case UserTurn():
                results = [part for part in parts if isinstance(part, ToolResultPart)]
                messages += [
                    {
                        "role": "tool",
                        "tool_call_id": result.tool_use_id,
                        "name": names.get(result.tool_use_id),
                        "content": result.text,
                    }
                    for result in results
                ]
                if texts or not results:
                    messages.append({"role": "user", "content": texts})
            case SystemTurn():
                messages.append({"role": "system", "content": texts})
    return messages


def _assistant(
    text: str, parts: Sequence[object], calls: Sequence[ToolUsePart]
) -> dict[str, object]:
    thoughts = [part.thinking for part in parts if isinstance(part, ThinkingPart)]
    told = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.input}}
        for c in calls
    ]
    return {
        "role": "assistant",
        "content": text,
        "reasoning_content": "\n".join(thoughts) or None,
        "tool_calls": told or None,
    }
