"""The bodies of OpenAI's chat and text completions, and what is made of them."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.api.backend import Engine
from astrai_serve.api.conversation import Conversation
from astrai_serve.api.errors import InvalidRequestError, from_validation
from astrai_serve.api.generation_request import GenerationRequest
from astrai_serve.api.openai_messages import (
    MAX_TOOLS,
    ChatMessage,
    ChatTool,
    ChatToolChoice,
    check_messages,
    check_turns,
    choice_of,
    tool_of,
)
from astrai_serve.api.openai_parameters import (
    MAX_CHOICES,
    UNSUPPORTED,
    ResponseFormat,
    SamplingBody,
    TokenId,
    check_model,
    check_supported,
    structure_of_format,
)
from astrai_serve.api.text_length import check_length
from astrai_serve.generation_defaults import GenerationDefaults

__all__ = [
    "ChatCompletionRequest",
    "CompletionRequest",
    "check_model",
    "parse_chat",
    "parse_completion",
]

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatCompletionRequest(SamplingBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ChatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ChatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, object] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None

    def to_generation(
        self, engine: Engine, tokenizer: AutoTokenizer, defaults: GenerationDefaults, salt: str
    ) -> GenerationRequest:
        """Render the messages and translate the rest.

        Raises:
            InvalidRequestError: something in it cannot be had.
        """
        self._check()
        texts = (message.text for message in self.messages)
        check_length(texts, tokenizer, engine.max_context, "messages")
        asked = structure_of_format(self.response_format) if self.response_format else None
        param, structure = self.form({"response_format": asked})
        conversation = Conversation(
            messages=[message.to_template() for message in self.messages],
            tools=[tool_of(tool.function) for tool in self.tools or ()],
            tool_choice=choice_of(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            structure=structure,
            thinks=None if self.reasoning_effort is None else self.reasoning_effort != "none",
            variables=self._variables(),
            add_generation_prompt=self.add_generation_prompt
            if self.add_generation_prompt is not None
            else not self.continue_final_message,
            continue_final_message=bool(self.continue_final_message),
        )
        prompt = conversation.prompt(tokenizer)
        return GenerationRequest(
            prompts=(prompt.ids,),
            params=self.sampling(
                tokenizer,
                defaults,
                max_tokens=self.max_completion_tokens or self.max_tokens,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                prompt_logprobs=self.prompt_logprobs,
                structure=prompt.structure,
                reads_message=True,
            ),
            n=self.n or 1,
            priority=self.turn,
            reading=prompt.reading,
            includes_stop=bool(self.include_stop_str_in_output),
            structure_param=param or "tools",
            tells_prompt=self.prompt_logprobs is not None,
            tells_token_ids=bool(self.return_token_ids),
            stream=self.streams,
            tells_progress=self.tells_progress,
            default_max_tokens=defaults.max_new_tokens,
            cache_salt=salt,
        )

    def _variables(self) -> dict[str, object]:
        """More names for the template."""
        effort = (
            {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        )
        return {**effort, **(self.chat_template_kwargs or {})}

    def _check(self) -> None:
        check_turns(self.messages)
        if self.echo:
            raise InvalidRequestError(
                "echo is not supported for chats; use continue_final_message, or /v1/completions",
                param="echo",
                code="unsupported_parameter",
            )
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


class CompletionRequest(SamplingBody):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    response_format: ResponseFormat | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None

    def to_generation(
        self, engine: Engine, tokenizer: AutoTokenizer, defaults: GenerationDefaults, salt: str
    ) -> GenerationRequest:
        """Tokenize the prompts and translate the rest.

        Raises:
            InvalidRequestError: something in it cannot be had.
        """
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequestError(
                f"best_of {self.best_of} is not supported unless it is n: all answers are given",
                param="best_of",
                code="unsupported_parameter",
            )
        prompts = self._prompts(engine, tokenizer)
        n = self.n or 1
        if n * len(prompts) > MAX_CHOICES:
            raise InvalidRequestError(
                f"n {n} of {len(prompts)} prompts: at most {MAX_CHOICES} answers", param="n"
            )
        asked = structure_of_format(self.response_format) if self.response_format else None
        param, structure = self.form({"response_format": asked})
        return GenerationRequest(
            prompts=prompts,
            params=self.sampling(
                tokenizer,
                defaults,
                max_tokens=self.max_tokens,
                logprobs=self.logprobs,
                # an echoed prompt tells of its tokens as the answer does
                prompt_logprobs=max(counts) if (counts := self._prompt_counts()) else None,
                structure=structure,
            ),
            n=n,
            priority=self.turn,
            includes_stop=bool(self.include_stop_str_in_output),
            structure_param=param,
            tells_token_ids=bool(self.return_token_ids),
            echo=bool(self.echo),
            tells_prompt=self.prompt_logprobs is not None,
            stream=self.streams,
            tells_progress=self.tells_progress,
            default_max_tokens=defaults.max_new_tokens,
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
        for prompt in prompts:
            if isinstance(prompt, str):
                check_length([prompt], tokenizer, engine.max_context, "prompt")
        return tuple(
            _encode(prompt, tokenizer) if isinstance(prompt, str) else tuple(prompt)
            for prompt in prompts
        )


def parse_chat(data: Mapping[str, object]) -> ChatCompletionRequest:
    """Check a body against the schema.

    Raises:
        InvalidRequestError: names the first parameter at fault.
    """
    check_supported(data, {**UNSUPPORTED, "suffix": (), "best_of": (1,)})
    check_messages(data)
    try:
        return ChatCompletionRequest.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, data) from None


def parse_completion(data: Mapping[str, object]) -> CompletionRequest:
    """Check a body against the schema.

    Raises:
        InvalidRequestError: names the first parameter at fault.
    """
    check_supported(data, {**UNSUPPORTED, "suffix": ("",), "tools": ()})
    try:
        return CompletionRequest.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, data) from None


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
