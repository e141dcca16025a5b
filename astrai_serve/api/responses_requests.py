"""The body of OpenAI's responses, and what is made of it. Nothing is stored between requests."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from astrai_core.generation import Structure
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.api.backend import Engine
from astrai_serve.api.conversation import Conversation, FunctionTool, ToolChoice
from astrai_serve.api.errors import InvalidRequestError, from_validation
from astrai_serve.api.generation_request import GenerationRequest
from astrai_serve.api.openai_messages import MAX_TOOLS, ToolName
from astrai_serve.api.openai_parameters import (
    Body,
    SamplingBody,
    check_one,
    check_supported,
)
from astrai_serve.api.openai_requests import Effort
from astrai_serve.api.text_length import check_length
from astrai_serve.generation_defaults import GenerationDefaults

# what is known and not done, and the values that ask for nothing; null and [] never do
_UNSUPPORTED: Mapping[str, Sequence[object]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "chat_template": (),
    "context_management": (),
    "conversation": (),
    "documents": (),
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "prompt_logprobs": (),
    "return_progress": (False,),
    "return_token_ids": (False,),
    "service_tier": ("auto", "default", "flex"),
    "store": (False,),
    "truncate_prompt_tokens": (),
    "truncation": ("disabled",),
}
_STATELESS = ("background", "conversation", "previous_response_id", "store")
ENCRYPTED, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"


class InputText(Body):
    """A piece of a message's text."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class Refusal(Body):
    """What a model said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


class InputMessage(Body):
    """One turn of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText | Refusal]

    @property
    def text(self) -> str:
        """The text of all parts."""
        if isinstance(self.content, str):
            return self.content
        return "".join(
            part.text if isinstance(part, InputText) else part.refusal for part in self.content
        )


class FunctionCall(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutput(Body):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]

    @property
    def text(self) -> str:
        """The text of all parts."""
        if isinstance(self.output, str):
            return self.output
        return "".join(part.text for part in self.output)


class ReasoningText(Body):
    """A piece of thoughts, or of a summary of them."""

    text: str


class ReasoningItem(Body):
    """What the model thought before an answer."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: list[ReasoningText] | None = None
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        """The thoughts; a summary only where there is nothing else."""
        if self.content:
            return "".join(part.text for part in self.content)
        if self.encrypted_content is not None:
            return unsealed(self.encrypted_content)
        return "\n\n".join(part.text for part in self.summary or ())


InputItem = InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem


class ResponseTool(Body):
    """A function that can be called."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class NamedTool(Body):
    """A tool by its name."""

    type: Literal["function"]
    name: str


class AllowedTools(Body):
    """The tools that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class TextFormat(Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Body):
    """How thoughts are to be."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class ResponseRequest(SamplingBody):
    """Body of POST /v1/responses."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = (
        None
    )
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, object] | None = None

    @property
    def tells_logprobs(self) -> bool:
        """Whether the text comes with log-probabilities."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def to_generation(
        self, engine: Engine, tokenizer: AutoTokenizer, defaults: GenerationDefaults, salt: str
    ) -> GenerationRequest:
        """Render the input and translate the rest.

        Raises:
            InvalidRequestError: something in it cannot be had.
        """
        messages = self.messages()
        texts = (str(message.get("content") or "") for message in messages)
        check_length(texts, tokenizer, engine.max_context, "input")
        param, structure = self.form({"text.format": self._format()})
        effort = self.reasoning.effort if self.reasoning is not None else None
        variables = {} if effort is None else {"reasoning_effort": effort}
        prompt = Conversation(
            messages=messages,
            tools=self._tools(),
            tool_choice=self._choice(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            structure=structure,
            thinks=None if effort is None else effort != "none",
            variables={**variables, **(self.chat_template_kwargs or {})},
        ).prompt(tokenizer)
        return GenerationRequest(
            prompts=(prompt.ids,),
            params=self.sampling(
                tokenizer,
                defaults,
                max_tokens=self.max_output_tokens or self.max_tokens,
                logprobs=(self.top_logprobs or 0) if self.tells_logprobs else None,
                structure=prompt.structure,
                reads_message=True,
            ),
            priority=self.turn,
            reading=prompt.reading,
            includes_stop=bool(self.include_stop_str_in_output),
            structure_param=param or "tools",
            default_max_tokens=defaults.max_new_tokens,
            stream=self.streams,
            cache_salt=salt,
        )

    def messages(self) -> list[dict[str, Any]]:
        """The input as chat templates know it: thoughts, text and calls of one turn are one."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        turn: dict[str, Any] | None = None  # of the assistant, as long as it goes on

        def assistant() -> dict[str, Any]:
            nonlocal turn
            if turn is None:
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            return turn

        for item in self.input:
            match item:
                case ReasoningItem():
                    turn = None
                    assistant()["reasoning_content"] = item.text
                case FunctionCall():
                    function = {"name": item.name, "arguments": item.arguments}
                    call = {"id": item.call_id, "type": "function", "function": function}
                    assistant().setdefault("tool_calls", []).append(call)
                case FunctionCallOutput():
                    turn = None
                    output = {"content": item.text, "tool_call_id": item.call_id}
                    messages.append({"role": "tool", **output})
                case InputMessage() if item.role == "assistant":
                    if turn is not None and (turn["content"] or turn.get("tool_calls")):
                        turn = None
                    assistant()["content"] = item.text
                case InputMessage():
                    turn = None
                    role = "system" if item.role == "developer" else item.role
                    messages.append({"role": role, "content": item.text})
        return messages

    def _format(self) -> Structure | None:
        wanted = self.text.format if self.text is not None else None
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return Structure.of_json()
        if wanted.schema_ is None:
            raise InvalidRequestError("text.format.schema is required", param="text.format.schema")
        return Structure.of_json(wanted.schema_)

    def _tools(self) -> list[FunctionTool]:
        return [
            FunctionTool(
                name=tool.name,
                description=tool.description,
                parameters=tool.parameters,
                strict=bool(tool.strict),
            )
            for tool in self.tools or ()
        ]

    def _choice(self) -> ToolChoice:
        match self.tool_choice:
            case None:
                return ToolChoice()
            case NamedTool():
                return ToolChoice(mode="required", names=(self.tool_choice.name,))
            case AllowedTools():
                names = tuple(tool.name for tool in self.tool_choice.tools)
                return ToolChoice(mode=self.tool_choice.mode, names=names)
            case mode:
                return ToolChoice(mode=mode)


def parse_response(data: Mapping[str, object]) -> ResponseRequest:
    """Check a body against the schema.

    Raises:
        InvalidRequestError: names the first parameter at fault.
    """
    for name in _STATELESS:
        harmless = _UNSUPPORTED[name]
        if data.get(name) not in (None, *harmless):
            raise InvalidRequestError(
                f"{name} is not supported: this server stores nothing between requests",
                param=name,
                code="unsupported_parameter",
            )
    check_supported(data, _UNSUPPORTED)
    check_one("text.verbosity", _inner(data, "text", "verbosity"), ("medium",))
    obfuscation = _inner(data, "stream_options", "include_obfuscation")
    check_one("stream_options.include_obfuscation", obfuscation, (False,))
    try:
        return ResponseRequest.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, data) from None


def sealed(thoughts: str) -> str:
    """Thoughts as a client that keeps no plain ones sends them back; no secret is kept by it."""
    return base64.b64encode(thoughts.encode()).decode()


def unsealed(content: str) -> str:
    """Thoughts as they were before they were sealed.

    Raises:
        InvalidRequestError: another server sealed them.
    """
    try:
        return base64.b64decode(content, validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidRequestError(
            "input: encrypted_content of a reasoning item is not of this server", param="input"
        ) from None


def _inner(data: Mapping[str, object], outer: str, name: str) -> object:
    value = data.get(outer)
    return value.get(name) if isinstance(value, dict) else None
