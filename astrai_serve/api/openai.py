"""OpenAI's words for answers: chat and text completions, streamed and in one piece, and errors."""

import codecs
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from astrai_serve.api.errors import ApiError
from astrai_serve.api.openai_requests import (
    ChatCompletionRequest,
    CompletionRequest,
    check_model,
    parse_chat,
    parse_completion,
)
from astrai_serve.api.protocol import Choice, JsonResponse, ProtocolHandler, StreamContext
from astrai_serve.api.sse import DONE, event
from astrai_serve.engine import Finish, TaskEvent, TokenLogprob


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
        return [event(chunk | {"usage": _usage(context), "timings": context.timings()}), DONE]

    def format_stream_error(self, error: ApiError) -> bytes:
        """The event that makes OpenAI's clients raise."""
        return event(error_body(error))

    def chunk(self, context: StreamContext, choice: Mapping[str, object]) -> bytes:
        """An event about one choice."""
        assert isinstance(context, OpenAIContext)
        chunk = self._envelope(context, self.chunk_name, [choice])
        if context.include_usage:
            chunk["usage"] = _usage(context) if context.continuous_usage else None
        return event(chunk)

    def whole(
        self, context: StreamContext, choices: Sequence[Mapping[str, object]]
    ) -> dict[str, object]:
        """The answer in one piece."""
        body = self._envelope(context, self.object_name, choices)
        return body | {"usage": _usage(context), "timings": context.timings()}

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

    def prompt_entries(self, context: StreamContext, index: int) -> dict[str, object]:
        """Log-probabilities of the prompt, if asked for in vLLM's words."""
        if not context.request.tells_prompt:
            return {}
        told = [
            {
                str(token_id): {
                    "logprob": _finite(logprob),
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

    @property
    def fingerprint(self) -> str:
        """Changes with what may change the answer to the same seed."""
        return f"astrai-{version('astrai')}-{self.settings.dtype or 'unknown'}"


class ChatHandler(OpenAIHandler):
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def read(self, data: Mapping[str, object], salt: str) -> OpenAIContext:
        """Understand a body."""
        return self.context(parse_chat(data), salt)

    def format_stream_start(self, context: StreamContext) -> Sequence[bytes]:
        """A role for each choice, in order, before any of them speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            self.chunk(context, self._choice(index, delta)) for index in range(len(context.choices))
        ]

    def format_stream_event(
        self, context: StreamContext, index: int, event: TaskEvent
    ) -> Sequence[bytes]:
        """The new text, then the reason of the end in an event of its own."""
        chunks: list[bytes] = []
        spoken = _spoken(event.logprobs, event.finish)
        if event.text or spoken:
            choice = self._choice(index, {"content": event.text}, self._logprobs(spoken))
            chunks.append(self.chunk(context, choice))
        if event.finish is not None:
            chunks.append(self.chunk(context, self._choice(index, {}) | _ending(event.finish)))
        return chunks

    def format_response(self, context: StreamContext) -> dict[str, object]:
        """All choices with their messages."""
        messages = [
            self._message(index, choice) | self.prompt_entries(context, index)
            for index, choice in enumerate(context.choices)
        ]
        return self.whole(context, messages)

    def _message(self, index: int, choice: Choice) -> dict[str, object]:
        assert choice.finish is not None
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(_spoken(choice.logprobs, choice.finish))
        entries = {"index": index, "message": message, "logprobs": logprobs}
        return entries | _ending(choice.finish)

    def _choice(
        self, index: int, delta: Mapping[str, object], logprobs: object = None
    ) -> dict[str, object]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, object] | None:
        if not logprobs:
            return None
        return {"content": [self._token(one) for one in logprobs], "refusal": None}

    def _token(self, one: TokenLogprob) -> dict[str, object]:
        top = [self._likely(token_id, logprob) for token_id, logprob in one.top]
        return self._likely(one.token_id, one.logprob) | {"top_logprobs": top}

    def _likely(self, token_id: int, logprob: float) -> dict[str, object]:
        text, content = self.token_text(token_id)
        return {"token": text, "bytes": list(content), "logprob": _finite(logprob)}


class CompletionHandler(OpenAIHandler):
    """POST /v1/completions, which nobody chats by: scripts do."""

    is_bulk = True

    id_prefix = "cmpl"
    object_name = "text_completion"
    chunk_name = "text_completion"

    def read(self, data: Mapping[str, object], salt: str) -> OpenAIContext:
        """Understand a body."""
        return self.context(parse_completion(data), salt)

    def format_stream_start(self, context: StreamContext) -> Sequence[bytes]:
        """The prompts, where they are to be given back; else the first event has text."""
        if not context.request.echo:
            return []
        ends = {"logprobs": None, "finish_reason": None}
        return [
            self.chunk(context, {"index": index, "text": self._echo(context, index)} | ends)
            for index in range(len(context.choices))
        ]

    def format_stream_event(
        self, context: StreamContext, index: int, event: TaskEvent
    ) -> Sequence[bytes]:
        """The new text, and the reason of the end with the last of it."""
        if not (event.text or event.logprobs or event.finish):
            return []
        choice = {
            "index": index,
            "text": event.text,
            "logprobs": self._logprobs(context, index, event.logprobs),
            "finish_reason": None,
        }
        if event.finish is not None:
            choice |= _ending(event.finish)
        return [self.chunk(context, choice)]

    def format_response(self, context: StreamContext) -> dict[str, object]:
        """All choices with their texts."""
        return self.whole(context, [self._text(context, i) for i in range(len(context.choices))])

    def _text(self, context: StreamContext, index: int) -> dict[str, object]:
        choice = context.choices[index]
        assert choice.finish is not None
        text = choice.text
        logprobs: Mapping[str, Sequence[object]] | None
        logprobs = self._logprobs(context, index, choice.logprobs)
        if context.request.echo:
            text = self._echo(context, index) + text
            if logprobs is not None:
                logprobs = self._logprobs_from_start(context, index)
        entries = {"index": index, "text": text, "logprobs": logprobs}
        return entries | self.prompt_entries(context, index) | _ending(choice.finish)

    def _echo(self, context: StreamContext, index: int) -> str:
        prompt = context.request.prompt_of(index)
        return b"".join(map(self.tokenizer.token_bytes, prompt)).decode(errors="replace")

    def _logprobs_from_start(
        self, context: StreamContext, index: int
    ) -> Mapping[str, Sequence[object]]:
        """Those of prompt and answer; nothing is said of the first token."""
        assert isinstance(context, OpenAIContext)
        choice = context.choices[index]
        context.offsets[index] = TextOffsets()
        first = TokenLogprob(token_id=context.request.prompt_of(index)[0], logprob=0.0)
        told = self._logprobs(context, index, [first, *choice.prompt_logprobs, *choice.logprobs])
        assert told is not None
        unknown = {
            name: [None, *entries[1:]]
            for name, entries in told.items()
            if name in ("token_logprobs", "top_logprobs")
        }
        return told | unknown

    def _logprobs(
        self, context: StreamContext, index: int, logprobs: Sequence[TokenLogprob]
    ) -> dict[str, list[object]] | None:
        assert isinstance(context, OpenAIContext)
        if not logprobs:
            return None
        offsets = context.offsets[index]
        return {
            "tokens": [self._token(one.token_id) for one in logprobs],
            "token_logprobs": [_finite(one.logprob) for one in logprobs],
            "top_logprobs": [
                # the chosen token has its own entry, however unlikely it was
                {
                    self._token(token_id): _finite(logprob)
                    for token_id, logprob in (*one.top, (one.token_id, one.logprob))
                }
                for one in logprobs
            ],
            "text_offset": [
                offsets.next(self.tokenizer.token_bytes(one.token_id)) for one in logprobs
            ],
        }

    def _token(self, token_id: int) -> str:
        return self.token_text(token_id, "bytes:")[0]


def _spoken(logprobs: Sequence[TokenLogprob], finish: Finish | None) -> Sequence[TokenLogprob]:
    """Leave out the token that ended the turn: a chat's tokens join to its message."""
    ended = finish is not None and finish.stop_token_id is not None
    return logprobs[:-1] if ended else logprobs


def _ending(finish: Finish) -> dict[str, object]:
    return {"finish_reason": str(finish.reason), "stop_reason": finish.stop}


def _usage(context: StreamContext) -> dict[str, object]:
    prompt, output = context.request.num_prompt_tokens, context.num_output_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": context.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that could not be."""
    return max(logprob, -9999.0)
