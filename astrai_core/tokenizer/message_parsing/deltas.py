"""What the parser gives: typed pieces of a message, and the message they join to."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReasoningText:
    """More of what the model thinks."""

    text: str


@dataclass(frozen=True)
class ContentText:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins; calls are numbered from 0 and never overlap."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of a call's arguments, which are a JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """A call has ended."""

    index: int
    is_complete: bool
    """Whether the arguments are a whole JSON object."""


Delta = ReasoningText | ContentText | ToolCallStart | ToolCallArguments | ToolCallEnd


@dataclass(kw_only=True)
class ParsedCall:
    """A call of a tool."""

    name: str
    arguments: str = ""
    """JSON; the beginning of it if the call was cut off."""
    is_complete: bool = False


@dataclass(kw_only=True)
class ParsedMessage:
    """Deltas put together."""

    reasoning: str = ""
    content: str = ""
    calls: list[ParsedCall] = field(default_factory=list[ParsedCall])

    def add(self, deltas: Iterable[Delta]) -> None:
        """Take in what a parser gave."""
        for delta in deltas:
            match delta:
                case ReasoningText():
                    self.reasoning += delta.text
                case ContentText():
                    self.content += delta.text
                case ToolCallStart():
                    self.calls.append(ParsedCall(name=delta.name))
                case ToolCallArguments():
                    self.calls[delta.index].arguments += delta.text
                case ToolCallEnd():
                    self.calls[delta.index].is_complete = delta.is_complete
