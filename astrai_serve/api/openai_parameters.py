"""What OpenAI's endpoints have in common: sampling, forms of answers, and what is not supported.

A parameter is honoured, or known and refused by name, or unknown and ignored, so that newer
clients keep working. Of what is known, only labels are ignored: `user`, `metadata`, cache keys.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from astrai_core.generation import SamplingParams, Structure
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.api.conversation import format_of
from astrai_serve.api.errors import InvalidRequestError, NotFoundError
from astrai_serve.generation_defaults import GenerationDefaults

MAX_CHOICES = 128

Number = TypeVar("Number", int, float)

LABELS = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})
"""Parameters that ask for nothing: they name the request for somebody's books."""

# what else is known, and the values that ask for nothing; null and [] never do
UNSUPPORTED: Mapping[str, Sequence[object]] = {
    "audio": (),
    "chat_template": (),
    "documents": (),
    "function_call": ("none",),
    "functions": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "service_tier": ("auto", "default", "flex"),
    "store": (False,),
    "truncate_prompt_tokens": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """A JSON object of a request; keys that are not known are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Body):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Body):
    """A schema and its name."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of an answer, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """The form of an answer, in vLLM's words."""

    json_: Annotated[dict[str, object] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None


class SamplingBody(Body):
    """What all endpoints take."""

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
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, object] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    service_tier: str | None = None
    user: str | None = None
    return_progress: bool | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer is to be streamed."""
        return bool(self.stream)

    @property
    def tells_progress(self) -> bool:
        """Whether a stream tells how far its prompts have come."""
        return self.streams and bool(self.return_progress)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return self.streams and bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each event of a stream carries the count so far."""
        options = self.stream_options
        return self.include_usage and bool(options and options.continuous_usage_stats)

    @property
    def turn(self) -> int:
        """The priority: below 0 sooner, above 0 later."""
        return self.priority or (1 if self.service_tier == "flex" else 0)

    def sampling(
        self,
        tokenizer: AutoTokenizer,
        defaults: GenerationDefaults,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        structure: Structure | None = None,
        reads_message: bool = False,
    ) -> SamplingParams:
        """Translate into the engine's words.

        Args:
            tokenizer: knows the control tokens, some of which may be written out.
            defaults: for what the client leaves out.
            max_tokens: most new tokens.
            logprobs: how many likely tokens to tell of.
            prompt_logprobs: the same for the prompt.
            structure: the form of the answer.
            reads_message: the answer is taken apart, for which its markup is written out.

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
                structure=structure,
                control_texts=self._control_texts(tokenizer, reads_message),
            )
        except ValueError as error:
            param = str(error).partition(" ")[0]
            raise InvalidRequestError(str(error), param=param) from error

    def _control_texts(
        self, tokenizer: AutoTokenizer, reads_message: bool
    ) -> tuple[tuple[int, str], ...]:
        if self.skip_special_tokens is False:
            return tuple((i, text) for text, i in tokenizer.control_tokens.items())
        return format_of(tokenizer).control_texts if reads_message else ()

    def form(self, more: Mapping[str, Structure | None]) -> tuple[str | None, Structure | None]:
        """The one form asked for, in whichever words, and the parameter that asks for it.

        Args:
            more: forms that are asked for in the endpoint's own words, by parameter.

        Raises:
            InvalidRequestError: several are asked for, or one is wrong.
        """
        asked = {name: form for name, form in more.items() if form is not None}
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
        return next(iter(asked.items()), (None, None))

    def _biases(self) -> tuple[tuple[int, float], ...]:
        for token in self.logit_bias or {}:
            if not (token.isascii() and token.isdigit() and len(token) <= 9):
                raise InvalidRequestError(
                    f"logit_bias: keys must be token ids, not {token[:60]!r}", param="logit_bias"
                )
        return tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())


def check_supported(
    data: Mapping[str, object], unsupported: Mapping[str, Sequence[object]]
) -> None:
    """Refuse what we know of and cannot do.

    Args:
        data: the body.
        unsupported: names, and values that ask for nothing.

    Raises:
        InvalidRequestError: names the parameter.
    """
    for name, harmless in unsupported.items():
        check_one(name, data.get(name), harmless)


def check_one(name: str, value: object, harmless: Sequence[object]) -> None:
    """Refuse a value unless it asks for nothing; raises `InvalidRequestError`."""
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


def structure_of_format(wanted: ResponseFormat) -> Structure | None:
    """The form that `response_format` asks for; raises `InvalidRequestError`."""
    if wanted.type == "text":
        return None
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


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value
