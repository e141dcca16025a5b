"""Messages and tools of OpenAI's chats, and what chat templates are told of them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from astrai_serve.api.conversation import FunctionTool, ToolChoice
from astrai_serve.api.errors import InvalidRequestError
from astrai_serve.api.openai_parameters import Body, check_one

MAX_TOOLS = 128

ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]

_UNSUPPORTED_IN_MESSAGES = ("audio", "function_call")


class TextPart(Body):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """What was called, and with what."""

    name: str
    arguments: str = ""


class ToolCall(Body):
    """A call that an assistant's message made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """The text of all parts."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def to_template(self) -> dict[str, object]:
        """Return the message as chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, object] = {"role": role, "content": self.text, "name": self.name}
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        if self.role == "assistant":
            message["reasoning_content"] = self.reasoning_content or self.reasoning
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls or ()] or None
        return message


class Function(Body):
    """A function that can be called."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class ChatTool(Body):
    """A tool, in the words of chats."""

    type: Literal["function"]
    function: Function


class _NamedFunction(Body):
    name: str


class NamedTool(Body):
    """The tool that must be called, in the words of chats."""

    type: Literal["function"]
    function: _NamedFunction


class _AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedTools(Body):
    """The tools that may be called, in the words of chats."""

    type: Literal["allowed_tools"]
    allowed_tools: _AllowedTools


ChatToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


def tool_of(function: Function) -> FunctionTool:
    """The tool, whatever the protocol."""
    return FunctionTool(
        name=function.name,
        description=function.description,
        parameters=function.parameters,
        strict=bool(function.strict),
    )


def choice_of(choice: ChatToolChoice | None) -> ToolChoice:
    """Which tools are called, whatever the protocol."""
    match choice:
        case None:
            return ToolChoice()
        case NamedTool():
            return ToolChoice(mode="required", names=(choice.function.name,))
        case AllowedTools():
            allowed = choice.allowed_tools
            return ToolChoice(
                mode=allowed.mode, names=tuple(tool.function.name for tool in allowed.tools)
            )
        case _:
            return ToolChoice(mode=choice)


def check_messages(data: Mapping[str, object]) -> None:
    """Refuse what we know of in messages and cannot do.

    Raises:
        InvalidRequestError: names it.
    """
    messages = data.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else []):
        if not isinstance(message, dict):
            continue
        for name in _UNSUPPORTED_IN_MESSAGES:
            check_one(f"messages[{index}].{name}", message.get(name), ())


def check_turns(messages: Sequence[ChatMessage]) -> None:
    """Refuse messages that say nothing, and calls that are not an assistant's.

    Raises:
        InvalidRequestError: names the part.
    """
    for index, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            name = f"messages[{index}].content"
            raise InvalidRequestError(f"{name}: must be a string or text parts", param=name)
        if message.tool_calls and message.role != "assistant":
            name = f"messages[{index}].tool_calls"
            raise InvalidRequestError(f"{name}: only an assistant calls tools", param=name)
