"""The bodies of OpenAI's chat and text completions, and what is made of them.

A parameter is honoured, or known and refused by name, or unknown and ignored, so that newer
clients keep working. Of what is known, only labels are ignored: `user`, `metadata`, cache keys.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from astrai_core.generation import SamplingParams, Structure
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.api.backend import Engine
from astrai_serve.api.errors import (
    ContextLengthError,
    InvalidRequestError,
    NotFoundError,
    from_validation,
)
from astrai_serve.api.generation_request import GenerationRequest
from astrai_serve.generation_defaults import GenerationDefaults

MAX_CHOICES = 128

Number = TypeVar("Number", int, float)

# what else is known, and the values that ask for nothing; null and [] never do
_UNSUPPORTED: Mapping[str, Sequence[object]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": (),
    "function_call": ("none",),
    "functions": (),
    "include_stop_str_in_output": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "priority": (0,),
    "reasoning_effort": ("none",),
    "return_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_UNSUPPORTED_IN_MESSAGES = ("audio", "function_call", "tool_call_id", "tool_calls")

_NonEmpty = Annotated[str, StringConstraints(min_length=1)]
_TokenId = Annotated[int, Field(ge=0)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(_Body):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(_Body):
    """A schema and its name."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Body):
    """The form of an answer, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(_Body):
    """The form of an answer, in vLLM's words."""

    json_: Annotated[dict[str, object] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None


class _SamplingBody(_Body):
    """What both endpoints take."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, _Bias] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _NonEmpty | Annotated[list[_NonEmpty], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, object] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: str | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer is to be streamed."""
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return self.streams and bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each event of a stream carries the count so far."""
        options = self.stream_options
        return self.include_usage and bool(options and options.continuous_usage_stats)

    def sampling(
        self,
        defaults: GenerationDefaults,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """Translate into the engine's words.

        Raises:
            InvalidRequestError: a value is out of range; the message names it.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                min_tokens=self.min_tokens or 0,
                temperature=_or(self.temperature, defaults.temperature),
                # -1 is vLLM's word for all
                top_k=max(0, _or(self.top_k, defaults.top_k)),
                # the smallest set that reaches 0 is the most likely token alone
                top_p=max(1e-9, _or(self.top_p, defaults.top_p)),
                min_p=defaults.min_p if self.min_p is None else self.min_p,
                repetition_penalty=_or(self.repetition_penalty, defaults.repetition_penalty),
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                logit_bias=self._biases(),
                seed=self.seed,
                stop=stop,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                structure=self._structure(),
            )
        except ValueError as error:
            param = str(error).partition(" ")[0]
            raise InvalidRequestError(str(error), param=param) from error

    def _structure(self) -> Structure | None:
        """The one form asked for, in whichever words."""
        asked: dict[str, Structure | None] = {}
        if self.response_format is not None and self.response_format.type != "text":
            asked["response_format"] = _of_format(self.response_format)
        if self.structured_outputs is not None:
            asked["structured_outputs"] = _of_fields(self.structured_outputs, "structured_outputs")
        guided = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        given = [name for name, value in guided.items() if value is not None]
        if given:
            name = f"guided_{given[0]}"
            asked[name] = _of_fields(StructuredOutputs.model_validate(guided), name)
        if len(asked) > 1:
            raise InvalidRequestError(
                f"{' and '.join(asked)} both say what the answer must be; give one of them",
                param=next(iter(asked)),
            )
        return next(iter(asked.values()), None)

    def _biases(self) -> tuple[tuple[int, float], ...]:
        for token in self.logit_bias or {}:
            if not (token.isascii() and token.isdigit() and len(token) <= 9):
                raise InvalidRequestError(
                    f"logit_bias: keys must be token ids, not {token[:60]!r}", param="logit_bias"
                )
        return tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())


class TextPart(_Body):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def to_template(self) -> dict[str, object]:
        """Return the message as chat templates know it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content or "", "name": self.name}


class ChatCompletionRequest(_SamplingBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def to_generation(
        self, engine: Engine, tokenizer: AutoTokenizer, defaults: GenerationDefaults, salt: str
    ) -> GenerationRequest:
        """Render the messages and translate the rest.

        Raises:
            InvalidRequestError: something in it cannot be had.
        """
        for index, message in enumerate(self.messages):
            if message.content is None and message.role != "assistant":
                name = f"messages[{index}].content"
                raise InvalidRequestError(f"{name}: must be a string or text parts", param=name)
        if self.prompt_logprobs is not None and self.streams:
            raise InvalidRequestError(
                "prompt_logprobs cannot be streamed; leave out stream", param="prompt_logprobs"
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidRequestError(
                f"max_tokens {self.max_tokens} and max_completion_tokens "
                f"{self.max_completion_tokens} differ: give one of them",
                param="max_tokens",
            )
        texts = [str(message.to_template()["content"]) for message in self.messages]
        _check_length(texts, engine, tokenizer, "messages")
        return GenerationRequest(
            prompts=(self._render(tokenizer),),
            params=self.sampling(
                defaults,
                self.max_completion_tokens or self.max_tokens,
                (self.top_logprobs or 0) if self.logprobs else None,
                self.prompt_logprobs,
            ),
            n=self.n or 1,
            tells_prompt=self.prompt_logprobs is not None,
            stream=self.streams,
            cache_salt=salt,
        )

    def _render(self, tokenizer: AutoTokenizer) -> tuple[int, ...]:
        if tokenizer.chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        try:
            ids = tokenizer.apply_chat_template(
                [message.to_template() for message in self.messages], add_generation_prompt=True
            )
        except ValueError as error:
            raise InvalidRequestError(str(error), param="messages") from error
        return tuple(ids)


class CompletionRequest(_SamplingBody):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[_TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    def to_generation(
        self, engine: Engine, tokenizer: AutoTokenizer, defaults: GenerationDefaults, salt: str
    ) -> GenerationRequest:
        """Tokenize the prompts and translate the rest.

        Raises:
            InvalidRequestError: something in it cannot be had.
        """
        prompts = self._prompts(engine, tokenizer)
        n = self.n or 1
        if n * len(prompts) > MAX_CHOICES:
            raise InvalidRequestError(
                f"n {n} of {len(prompts)} prompts: at most {MAX_CHOICES} answers", param="n"
            )
        return GenerationRequest(
            prompts=prompts,
            params=self.sampling(
                defaults,
                self.max_tokens,
                self.logprobs,
                # an echoed prompt tells of its tokens as the answer does
                max(counts) if (counts := self._prompt_counts()) else None,
            ),
            n=n,
            echo=bool(self.echo),
            tells_prompt=self.prompt_logprobs is not None,
            stream=self.streams,
            cache_salt=salt,
        )

    def _prompt_counts(self) -> list[int]:
        if self.prompt_logprobs is not None and self.streams:
            raise InvalidRequestError(
                "prompt_logprobs cannot be streamed; leave out stream", param="prompt_logprobs"
            )
        if self.echo and self.logprobs is not None and self.streams:
            raise InvalidRequestError(
                "echo with logprobs cannot be streamed; leave out stream", param="echo"
            )
        counts = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return [count for count in counts if count is not None]

    def _prompts(self, engine: Engine, tokenizer: AutoTokenizer) -> tuple[tuple[int, ...], ...]:
        prompts = _as_list(self.prompt)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        _check_length(texts, engine, tokenizer, "prompt")
        return tuple(
            _encode(prompt, tokenizer) if isinstance(prompt, str) else tuple(prompt)
            for prompt in prompts
        )


def check_supported(data: Mapping[str, object]) -> None:
    """Refuse what we know of and cannot do.

    Raises:
        InvalidRequestError: names the parameter.
    """
    for name, harmless in _UNSUPPORTED.items():
        _check_one(name, data.get(name), harmless)
    messages = data.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else []):
        for name in _UNSUPPORTED_IN_MESSAGES if isinstance(message, dict) else ():
            _check_one(f"messages[{index}].{name}", message.get(name), ())


def _check_one(name: str, value: object, harmless: Sequence[object]) -> None:
    if (
        value is None
        or value == []
        or any(value == one and type(value) is type(one) for one in harmless)
    ):
        return
    raise InvalidRequestError(
        f"{name} is not supported by this server", param=name, code="unsupported_parameter"
    )


def check_model(name: str | None, served: str) -> None:
    """Refuse a model that is not here.

    Raises:
        NotFoundError: names both.
    """
    if name is not None and name != served:
        raise NotFoundError(
            f"the model {name[:200]!r} does not exist; this server has {served!r}",
            param="model",
            code="model_not_found",
        )


def parse_chat(data: Mapping[str, object]) -> ChatCompletionRequest:
    """Check a body against the schema.

    Raises:
        InvalidRequestError: names the first parameter at fault.
    """
    check_supported(data)
    try:
        return ChatCompletionRequest.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, data) from None


def parse_completion(data: Mapping[str, object]) -> CompletionRequest:
    """Check a body against the schema.

    Raises:
        InvalidRequestError: names the first parameter at fault.
    """
    check_supported(data)
    try:
        return CompletionRequest.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, data) from None


def _of_format(wanted: ResponseFormat) -> Structure:
    if wanted.type == "json_object":
        return Structure.of_json()
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise InvalidRequestError(
            "response_format.json_schema.schema is required", param="response_format"
        )
    return Structure.of_json(wanted.json_schema.schema_)


def _of_fields(wanted: StructuredOutputs, param: str) -> Structure:
    if wanted.structural_tag is not None:
        raise InvalidRequestError(
            "structured_outputs.structural_tag is not supported by this server",
            param="structured_outputs",
            code="unsupported_parameter",
        )
    schema = wanted.json_
    if schema is None and wanted.json_object:
        schema = {"type": "object"}
    try:
        return Structure(
            json_schema=schema if schema is None or isinstance(schema, str) else json.dumps(schema),
            regex=wanted.regex,
            choice=None if wanted.choice is None else tuple(wanted.choice),
            grammar=wanted.grammar,
        )
    except ValueError as error:
        raise InvalidRequestError(f"{param}: {error}", param=param) from None


def _as_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    return [ids] if ids else [item for item in prompt if not isinstance(item, int)]


def _encode(text: str, tokenizer: AutoTokenizer) -> tuple[int, ...]:
    ids = tokenizer.encode(text, add_special_tokens=True)
    if not ids:
        raise InvalidRequestError("prompt: must not be empty", param="prompt")
    return tuple(ids)


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _check_length(
    texts: Sequence[str], engine: Engine, tokenizer: AutoTokenizer, param: str
) -> None:
    """Refuse what cannot fit however well it is tokenized, before work is spent on it."""
    longest_token = max(tokenizer.token_byte_lengths)
    num_bytes = max((len(text.encode()) for text in texts), default=0)
    if num_bytes > longest_token * engine.max_context:
        raise ContextLengthError(
            f"{param} has a text of {num_bytes} bytes, which cannot fit into this model's context "
            f"of {engine.max_context} tokens",
            param=param,
        )
