"""OpenAI's words for answers that chats and text completions share, and for errors."""

import codecs
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

from astrai_serve.api.errors import ApiError
from astrai_serve.api.openai_requests import (
    ChatCompletionRequest,
    CompletionRequest,
    check_model,
)
from astrai_serve.api.protocol import JsonResponse, ProtocolHandler, StreamContext
from astrai_serve.api.sse import DONE, event
from astrai_serve.engine import Finish, TokenLogprob


def error_body(error: ApiError) -> dict[str, object]:
    """The envelope that OpenAI's clients turn into their exceptions."""
    fields = {"message": error.message, "type": error.type, "param": error.param}
    return {"error": {**fields, "code": error.code}}


def error_response(error: ApiError) -> JsonResponse:
    """An answer that is an error."""
    return JsonResponse(error_body(error), status_code=error.status, headers=error.headers)


@dataclass(kw_only=True)
class OpenAIContext(StreamContext):
    """What the client wants to hear beside the text."""

    include_usage: bool
    continuous_usage: bool
    offsets: list["TextOffsets"]
    """Where the next token of each choice begins."""
    num_told_tokens: int | None = None
    """Of the prompts, that the client has heard of."""


class TextOffsets:
    """Where each token of a text begins, in characters; a token may be half of one."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def next(self, token: bytes) -> int:
        """Return where `token` begins and go on behind it."""
        start = self._num_characters
        self._num_characters += len(self._decoder.decode(token))
        return start


class OpenAIHandler(ProtocolHandler):
    """What chat and text completions have in common."""

    id_prefix: str
    object_name: str
    chunk_name: str

    def salt_of(self, data: Mapping[str, object]) -> str | None:
        """Return the client's `cache_salt`."""
        salt = data.get("cache_salt")
        return salt if isinstance(salt, str) else None

    def context(self, body: ChatCompletionRequest | CompletionRequest, salt: str) -> OpenAIContext:
        """Start the record of one request."""
        check_model(body.model, self.settings.model_name)
        request = body.to_generation(self.engine, self.tokenizer, self.settings.defaults, salt)
        return OpenAIContext(
            request=request,
            response_id=f"{self.id_prefix}-{uuid.uuid4().hex}",
            model=self.settings.model_name,
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            offsets=[TextOffsets() for _ in range(request.num_choices)],
        )

    def format_stream_end(self, context: StreamContext) -> Sequence[bytes]:
        """The count of tokens, if asked for, and the end mark."""
        assert isinstance(context, OpenAIContext)
        if not context.include_usage:
            return [DONE]
        chunk = self._envelope(context, self.chunk_name, [])
        return [event(chunk | {"usage": usage(context), "timings": context.timings()}), DONE]

    def format_stream_error(self, error: ApiError) -> bytes:
        """The event that makes OpenAI's clients raise."""
        return event(error_body(error))

    def chunk(self, context: StreamContext, choice: Mapping[str, object]) -> bytes:
        """An event about one choice."""
        return event(self._chunk(context, [choice]))

    def progress(self, context: StreamContext) -> Sequence[bytes]:
        """An event of how far the prompts have come, if it is asked for and news."""
        assert isinstance(context, OpenAIContext)
        if not context.request.tells_progress:
            return []
        told, context.num_told_tokens = context.num_told_tokens, context.num_computed_tokens
        if told == context.num_told_tokens:
            return []
        return [event(self._chunk(context, []) | {"prompt_progress": context.progress()})]

    def _chunk(
        self, context: StreamContext, choices: Sequence[Mapping[str, object]]
    ) -> dict[str, object]:
        assert isinstance(context, OpenAIContext)
        chunk = self._envelope(context, self.chunk_name, choices)
        if context.include_usage:
            chunk["usage"] = usage(context) if context.continuous_usage else None
        return chunk

    def whole(
        self, context: StreamContext, choices: Sequence[Mapping[str, object]]
    ) -> dict[str, object]:
        """The answer in one piece."""
        body = self._envelope(context, self.object_name, choices)
        return body | {"usage": usage(context), "timings": context.timings()}

    def token_text(self, token_id: int, prefix: str = "") -> tuple[str, bytes]:
        """Return a token as text and as the bytes it stands for.

        A control token has its name, and half a character its bytes in hexadecimal.

        Args:
            token_id: the token.
            prefix: marks such bytes.
        """
        content = self.tokenizer.token_bytes(token_id)
        if not content:
            name = self.tokenizer.decode([token_id], skip_special_tokens=False)
            return name, name.encode()
        try:
            return content.decode(), content
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in content), content

    def token_id_entries(
        self, context: StreamContext, index: int, new_ids: Sequence[int], is_first: bool
    ) -> dict[str, object]:
        """Token ids of an answer, and of its prompt with the first of them, if asked for."""
        if not context.request.tells_token_ids:
            return {}
        entries: dict[str, object] = {"token_ids": list(new_ids)}
        if is_first:
            entries["prompt_token_ids"] = list(context.request.prompt_of(index))
        return entries

    def prompt_entries(self, context: StreamContext, index: int) -> dict[str, object]:
        """Log-probabilities of the prompt, if asked for in vLLM's words."""
        if not context.request.tells_prompt:
            return {}
        told = [
            {
                str(token_id): {
                    "logprob": finite(logprob),
                    "decoded_token": self.token_text(token_id)[0],
                }
                for token_id, logprob in (*one.top, (one.token_id, one.logprob))
            }
            for one in context.choices[index].prompt_logprobs
        ]
        return {"prompt_logprobs": [None, *told]}

    def _envelope(
        self, context: StreamContext, name: str, choices: Sequence[Mapping[str, object]]
    ) -> dict[str, object]:
        return {
            "id": context.response_id,
            "object": name,
            "created": context.created,
            "model": context.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    @cached_property  # each chunk tells it, and a package's version is slow to read
    def fingerprint(self) -> str:
        """Changes with what may change the answer to the same seed."""
        return f"astrai-{version('astrai')}-{self.settings.dtype or 'unknown'}"


def spoken(logprobs: Sequence[TokenLogprob], finish: Finish | None) -> Sequence[TokenLogprob]:
    """Leave out the token that ended the turn: a chat's tokens join to its message."""
    ended = finish is not None and finish.stop_token_id is not None
    return logprobs[:-1] if ended else logprobs


def ending(finish: Finish) -> dict[str, object]:
    """How an answer ended."""
    return {"finish_reason": str(finish.reason), "stop_reason": finish.stop}


def usage(context: StreamContext) -> dict[str, object]:
    """Tokens in and out."""
    prompt, output = context.request.num_prompt_tokens, context.num_output_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": context.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": num_thought_tokens(context)},
    }


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that could not be."""
    return max(logprob, -9999.0)


def num_thought_tokens(context: StreamContext) -> int:
    """Tokens of thoughts in all answers."""
    return sum(choice.num_thought_tokens for choice in context.choices)
