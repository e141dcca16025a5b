"""The bodies of Anthropic's messages, and what is made of them.

A parameter is honoured, or known and refused by name, or unknown and ignored. Of what is known,
only labels are ignored: `metadata`, ids of users and workspaces, and `cache_control`, for every
prompt is cached as far as it can be.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from astrai_core.generation import SamplingParams, Structure
from astrai_core.tokenizer import AutoTokenizer
from astrai_core.tokenizer.message_parsing import MessageFormat
from astrai_serve.api.anthropic_messages import (
    AssistantTurn,
    TextPart,
    ToolResultPart,
    Turn,
    join_texts,
    to_template,
)
from astrai_serve.api.conversation import (
    Conversation,
    FunctionTool,
    Prompt,
    ToolChoice,
    format_of,
)
from astrai_serve.api.errors import InvalidRequestError, from_validation
from astrai_serve.api.openai_parameters import Body
from astrai_serve.api.text_length import check_length
from astrai_serve.generation_defaults import GenerationDefaults

# Claude Code's first line is another one each time, and would make every prompt a new one
_NONCE = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
_Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
_NonEmpty = Annotated[str, StringConstraints(min_length=1)]

# what else is known, and the values that ask for nothing; null and [] never do
_UNSUPPORTED: Mapping[str, Sequence[object]] = {
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "fallbacks": (),
    "inference_geo": ("global",),
    "mcp_servers": (),
    "speed": ("standard",),
}


class ToolDefinition(Body):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: _Name
    description: str | None = None
    input_schema: dict[str, object]
    strict: bool | None = None

    def to_function(self) -> FunctionTool:
        """Return the tool as both protocols know it."""
        return FunctionTool(
            name=self.name,
            description=self.description,
            parameters=self.input_schema,
            strict=bool(self.strict),
        )


class ToolChoiceParam(Body):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1024)] | None = None
    display: Literal["summarized", "omitted"] | None = None

    @property
    def wish(self) -> bool | None:
        """Whether to think; None leaves it to the model."""
        return None if self.type == "adaptive" else self.type == "enabled"


class OutputFormat(Body):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, object], Field(alias="schema")]


class OutputConfig(Body):
    """The form of the answer, and how hard to try."""

    format: OutputFormat | None = None
    effort: Literal["high"] | None = None


class CountTokensRequest(Body):
    """Body of POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: Annotated[
        list[Annotated[Turn, Field(discriminator="role")]],
        Field(min_length=1),
    ]
    system: str | list[TextPart] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    @property
    def continued(self) -> str | None:
        """The beginning of the answer, where the last message is the model's own."""
        last = self.messages[-1]
        if not isinstance(last, AssistantTurn):
            return None
        if isinstance(last.content, str):
            return last.content
        for index, part in enumerate(last.content):
            if not isinstance(part, TextPart):
                name = f"messages[{len(self.messages) - 1}].content[{index}]"
                raise InvalidRequestError(
                    f"{name}: the last message, if it is the assistant's, is the beginning of the "
                    "answer and must be text",
                    param=name,
                )
        return join_texts(part for part in last.content if isinstance(part, TextPart))

    def prompt(self, tokenizer: AutoTokenizer, max_context: int) -> Prompt:
        """Render and tokenize, and find out how the answer will be written.

        Raises:
            InvalidRequestError: this model, or any, cannot do it.
        """
        check_length(self.texts(), tokenizer, max_context, "messages")
        self.check(format_of(tokenizer))
        continued = self.continued
        messages = [*self._system(), *to_template(self.messages)]
        if continued is not None and len(messages) == 1:
            raise InvalidRequestError("messages: must begin with a user's", param="messages")
        choice = self.tool_choice or ToolChoiceParam(type="auto")
        modes: dict[str, Literal["auto", "none", "required"]] = {
            "auto": "auto", "none": "none", "any": "required", "tool": "required"
        }  # fmt: skip
        form = self.output_format or (self.output_config.format if self.output_config else None)
        conversation = Conversation(
            messages=messages,
            tools=[tool.to_function() for tool in self.tools or ()],
            tool_choice=ToolChoice(
                mode=modes[choice.type], names=(choice.name,) if choice.name is not None else None
            ),
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            structure=None if form is None else Structure.of_json(form.schema_),
            thinks=None if self.thinking is None else self.thinking.wish,
            add_generation_prompt=continued is None,
            continue_final_message=continued is not None,
        )
        try:
            return conversation.prompt(tokenizer)
        except InvalidRequestError as error:
            raise _in_our_words(error) from error

    @property
    def structure_param(self) -> str:
        """The parameter to name when the engine cannot keep the answer's form."""
        if self.output_format is not None:
            return "output_format"
        if self.output_config is not None and self.output_config.format is not None:
            return "output_config.format"
        is_forced = self.tool_choice is not None and self.tool_choice.type in ("any", "tool")
        return "tool_choice" if is_forced else "tools"

    def check(self, message_format: MessageFormat) -> None:
        """Refuse what this model cannot do or what contradicts itself.

        Raises:
            InvalidRequestError: names the parameter.
        """
        thinking, choice = self.thinking, self.tool_choice
        is_thinking = thinking is not None and thinking.type == "enabled"
        if is_thinking and message_format.thoughts is None:
            raise InvalidRequestError(
                "thinking: this model's chat template has no place for thoughts; send "
                "{'type': 'disabled'}",
                param="thinking",
            )
        if thinking is not None and is_thinking and thinking.budget_tokens is None:
            name = "thinking.budget_tokens"
            raise InvalidRequestError(f"{name} is required", param=name)
        is_forced = choice is not None and choice.type in ("any", "tool")
        if is_forced and is_thinking:
            raise InvalidRequestError(
                "tool_choice: thinking goes with auto and none only", param="tool_choice"
            )
        if choice is not None and (choice.type == "tool") != (choice.name is not None):
            name = "tool_choice.name"
            raise InvalidRequestError(f"{name} goes with type 'tool', and only so", param=name)

    def texts(self) -> list[str]:
        """All that was written, to see how long it is."""
        parts: list[str] = [self.system] if isinstance(self.system, str) else []
        contents = [turn.content for turn in self.messages]
        for content in (*contents, self.system if not isinstance(self.system, str) else None):
            if isinstance(content, str):
                parts.append(content)
            else:
                parts += [p.text for p in content or () if isinstance(p, TextPart | ToolResultPart)]
        return parts

    def _system(self) -> list[dict[str, object]]:
        """The system prompt, without what is another one each time."""
        system = self.system
        parts = [system] if isinstance(system, str) else [part.text for part in system or ()]
        kept = [text for text in (_NONCE.sub("", part) for part in parts) if text]
        return [{"role": "system", "content": "\n".join(kept)}] if kept else []


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=0)]
    stop_sequences: Annotated[list[_NonEmpty], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stream: bool | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def check(self, message_format: MessageFormat) -> None:
        """Refuse what this model cannot do or what contradicts itself.

        Raises:
            InvalidRequestError: names the parameter.
        """
        super().check(message_format)
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            name = "thinking.budget_tokens"
            raise InvalidRequestError(
                f"{name} {budget} must be below max_tokens {self.max_tokens}", param=name
            )

    def sampling(self, defaults: GenerationDefaults, prompt: Prompt, room: int) -> SamplingParams:
        """Translate into the engine's words.

        Args:
            defaults: for what the request does not say.
            prompt: of this request.
            room: tokens that fit behind it.

        Raises:
            InvalidRequestError: a value is out of range; the message names it.
        """
        try:
            return SamplingParams(
                # Anthropic's clients ask for the most a model may say, whatever the prompt is:
                # where the context ends first, the answer says so
                max_tokens=min(max(1, self.max_tokens), room),
                temperature=_or(self.temperature, defaults.temperature),
                top_k=defaults.top_k if self.top_k is None else self.top_k,
                # the smallest set that reaches 0 is the most likely token alone
                top_p=max(1e-9, _or(self.top_p, defaults.top_p)),
                min_p=defaults.min_p,
                repetition_penalty=defaults.repetition_penalty,
                stop=tuple(self.stop_sequences or ()),
                control_texts=prompt.reading.format.control_texts,
                structure=prompt.structure if self.max_tokens else None,
            )
        except ValueError as error:
            raise InvalidRequestError(str(error), param=str(error).partition(" ")[0]) from error


def parse(kind: type[CountTokensRequest], data: Mapping[str, object]) -> Any:
    """Check a body against its schema.

    Raises:
        InvalidRequestError: names the first parameter at fault.
    """
    for name, harmless in _UNSUPPORTED.items():
        value = data.get(name)
        if value is not None and value != [] and value not in harmless:
            raise InvalidRequestError(
                f"{name} is not supported by this server", param=name, code="unsupported_parameter"
            )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, data) from None


def _in_our_words(error: InvalidRequestError) -> InvalidRequestError:
    """Name parameters as this protocol does."""
    message, param = error.message, error.param
    for theirs, ours in (
        ("response_format", "output_config.format"),
        ("reasoning_effort", "thinking"),
    ):
        message = message.replace(theirs, ours)
        param = ours if param == theirs else param
    if param is not None and not message.startswith(param):
        message = f"{param}: {message}"
    return InvalidRequestError(message, param=param, code=error.code)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
