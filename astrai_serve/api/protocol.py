"""The way of every generating request: read, admit, then stream or collect.

A protocol says how a body becomes a `GenerationRequest` and how events become its own words; the
order of things, cancelling and errors are the same for all. Everything that can be refused is
refused before the first byte: after it, an error can only arrive in-band.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import anyio.to_thread
from pydantic_core import from_json
from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from astrai_core.generation import FinishReason
from astrai_core.tokenizer import AutoTokenizer
from astrai_core.tokenizer.message_parsing import Delta, MessageParser, ParsedMessage
from astrai_serve.api.admission import check_patience, check_prompt
from astrai_serve.api.auth import cache_salt, client_of
from astrai_serve.api.backend import Engine
from astrai_serve.api.errors import ApiError, InternalError, InvalidRequestError, UnavailableError
from astrai_serve.api.generation_request import Generation, GenerationRequest
from astrai_serve.api.settings import ServerSettings
from astrai_serve.api.shutdown import Shutdown
from astrai_serve.api.sse import EventStream, comment, to_json
from astrai_serve.engine import Finish, TaskEvent, TokenLogprob

logger = logging.getLogger(__name__)

# longer bodies are parsed and tokenized beside the event loop; for short ones the way there costs
# more than the work
_INLINE_BYTES = 8192


class JsonResponse(Response):
    """A response of one JSON object, written as the streams write theirs."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Encode the object."""
        return to_json(content).encode()


@dataclass(kw_only=True)
class Choice:
    """One answer as far as it has come."""

    pieces: list[str] = field(default_factory=list[str])
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    num_cached_tokens: int | None = None
    num_computed_tokens: int = 0
    """Of the prompt, where progress is told."""
    finish: Finish | None = None
    token_ids: list[int] = field(default_factory=list[int])
    parser: MessageParser | None = None
    """Takes the text apart, where it is a message."""
    deltas: list[Delta] = field(default_factory=list[Delta])
    """What the last event brought."""
    message: ParsedMessage = field(default_factory=ParsedMessage)
    """All deltas so far."""
    num_thought_tokens: int = 0
    """Tokens after which the text ended within thoughts."""

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self.pieces)


@dataclass(kw_only=True)
class StreamContext:
    """What a protocol remembers of one request while it is answered."""

    request: GenerationRequest
    response_id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    choices: list[Choice] = field(init=False)
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float | None = None

    def __post_init__(self) -> None:
        reading = self.request.reading
        self.choices = [
            Choice(parser=None if reading is None else reading.parser())
            for _ in range(self.request.num_choices)
        ]

    def add(self, index: int, event: TaskEvent) -> None:
        """Take in an event of choice `index`.

        Raises:
            ApiError: the event tells of a failure.
        """
        choice = self.choices[index]
        choice.pieces.append(event.text)
        choice.token_ids += event.token_ids
        choice.num_tokens += len(event.token_ids)
        choice.logprobs += event.logprobs
        choice.prompt_logprobs += event.prompt_logprobs
        choice.finish = event.finish
        if event.num_cached_tokens is not None:
            choice.num_cached_tokens = event.num_cached_tokens
        if event.num_computed_tokens is not None:
            choice.num_computed_tokens = event.num_computed_tokens
        if self.first_token is None and event.token_ids:
            self.first_token = time.perf_counter()
        if event.finish is not None:
            _raise_for(event.finish)
        if choice.parser is not None:
            start = choice.parser.num_characters
            choice.deltas = choice.parser.feed(event.text)
            choice.num_thought_tokens += sum(
                choice.parser.thinks_after(start + end) for end in event.text_ends
            )
            choice.deltas += choice.parser.finish() if event.finish is not None else []
            choice.message.add(choice.deltas)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that no answer had to compute, as far as answers have begun."""
        begun = [
            [choice.num_cached_tokens for choice in samples if choice.num_cached_tokens is not None]
            for samples in _groups(self.choices, self.request.n)
        ]
        return sum(min(cached, default=0) for cached in begun)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens of all prompts that are read; samples of one prompt share what one has read."""
        return sum(
            max(choice.num_computed_tokens for choice in samples)
            for samples in _groups(self.choices, self.request.n)
        )

    def counts(self) -> dict[str, object]:
        """What the log tells of the request."""
        first = None if self.first_token is None else round(self.first_token - self.submitted, 4)
        ends = [choice.finish.reason if choice.finish else "none" for choice in self.choices]
        return {
            "stream": self.request.stream,
            "prompt_tokens": self.request.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": self.num_output_tokens,
            "first_token_seconds": first,
            "finish": ",".join(sorted(set(ends))),
        }

    def progress(self) -> dict[str, object]:
        """How far the prompts have come; the words are those of llama.cpp's server."""
        return {
            "total": self.request.num_prompt_tokens,
            "cache": self.num_cached_tokens,
            "processed": self.num_computed_tokens,
            "time_ms": _milliseconds(time.perf_counter() - self.submitted),
        }

    def timings(self) -> dict[str, object]:
        """Where the time went; the words are those of llama.cpp's server."""
        now = time.perf_counter()
        first = self.first_token or now
        cached = self.num_cached_tokens
        computed = self.request.num_prompt_tokens - cached
        # the first token of each answer comes with its prompt
        predicted = max(0, self.num_output_tokens - len(self.choices))
        return {
            "cache_n": cached,
            "prompt_n": computed,
            "prompt_ms": _milliseconds(first - self.submitted),
            "prompt_per_second": _rate(computed, first - self.submitted),
            "predicted_n": self.num_output_tokens,
            "predicted_ms": _milliseconds(now - first),
            "predicted_per_second": _rate(predicted, now - first),
        }


class ProtocolHandler(ABC):
    """Answers requests of one protocol at one address.

    `is_bulk` says whether chat turns may pass its requests.

    Args:
        engine: generates.
        tokenizer: the engine's.
        settings: names and limits.
        shutdown: is told what is under way.
        limiter: how many bodies are parsed at once beside the event loop.
    """

    is_bulk = False

    def __init__(
        self,
        engine: Engine,
        tokenizer: AutoTokenizer,
        settings: ServerSettings,
        shutdown: Shutdown,
        limiter: anyio.CapacityLimiter,
    ):
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.shutdown = shutdown
        self.limiter = limiter

    @abstractmethod
    def read(self, data: Mapping[str, object], salt: str) -> StreamContext:
        """Understand a body.

        Raises:
            ApiError: it asks for what is wrong or not to be had.
        """

    @abstractmethod
    def salt_of(self, data: Mapping[str, object]) -> str | None:
        """Return what the client wants its cached prefixes set apart by."""

    @abstractmethod
    def format_stream_start(self, context: StreamContext) -> Sequence[bytes]:
        """Events before anything is generated."""

    @abstractmethod
    def format_stream_event(
        self, context: StreamContext, index: int, event: TaskEvent
    ) -> Sequence[bytes]:
        """Events for news of choice `index`, which `context` has taken in."""

    @abstractmethod
    def format_stream_end(self, context: StreamContext) -> Sequence[bytes]:
        """Events after all choices have ended."""

    @abstractmethod
    def format_stream_error(self, error: ApiError) -> bytes:
        """The event that ends a failed stream."""

    def format_stream_failure(self, context: StreamContext, error: ApiError) -> Sequence[bytes]:
        """The events that end a failed stream, for protocols that tell more of the request."""
        del context
        return [self.format_stream_error(error)]

    @abstractmethod
    def format_response(self, context: StreamContext) -> Mapping[str, object]:
        """The body of an answer in one piece."""

    def ping(self) -> ServerSentEvent:
        """The sign of life of a silent stream; clients take a comment for nothing."""
        return comment()

    async def handle(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            ApiError: it is refused, or, when it does not stream, fails.
        """
        self.shutdown.check()
        body = await request.body()
        if len(body) <= _INLINE_BYTES:
            context = self._read(body, request)
        else:
            context = await anyio.to_thread.run_sync(
                self._read, body, request, limiter=self.limiter
            )
        check_prompt(context.request, self.settings)
        if context.request.params.structure is None:
            context.request.prepare(self.engine)
        else:
            await anyio.to_thread.run_sync(
                context.request.prepare, self.engine, limiter=self.limiter
            )
        self.shutdown.check()
        check_patience(context.request, self.engine, request.headers)
        context.submitted = time.perf_counter()
        generation = context.request.submit(self.engine)
        self.shutdown.add(generation)
        if context.request.stream:
            return EventStream(
                self._stream(context, generation),
                on_close=lambda: self._close(context, generation, request),
                ping_seconds=self.settings.ping_seconds,
                ping=self.ping,
            )
        try:
            return await self._collect(context, generation, request)
        finally:
            self._close(context, generation, request)

    def _close(self, context: StreamContext, generation: Generation, request: Request) -> None:
        self.shutdown.remove(generation)
        request.scope.get("state", {}).get("log", {}).update(context.counts())

    def _read(self, body: bytes, request: Request) -> StreamContext:
        data = parse_object(body)
        salt = cache_salt(request.headers, self.settings.api_keys, self.salt_of(data))
        context = self.read(data, salt)
        context.request = replace(
            context.request,
            client=client_of(request.headers, self.settings.api_keys),
            is_bulk=self._is_bulk(context.request),
        )
        return context

    def _is_bulk(self, request: GenerationRequest) -> bool:
        if request.priority:
            return request.priority > 0
        return request.is_bulk or self.is_bulk

    async def _stream(self, context: StreamContext, generation: Generation) -> AsyncIterator[bytes]:
        try:
            for encoded in self.format_stream_start(context):
                yield encoded
            async for index, event in generation:
                context.add(index, event)
                for encoded in self.format_stream_event(context, index, event):
                    yield encoded
            for encoded in self.format_stream_end(context):
                yield encoded
        except ApiError as error:
            for encoded in self.format_stream_failure(context, error):
                yield encoded
        except Exception:
            # the status is out: the client must hear of it in the stream, the operator in the log
            logger.exception("a stream failed")
            error = InternalError("the server failed; its log says why")
            for encoded in self.format_stream_failure(context, error):
                yield encoded

    async def _collect(
        self, context: StreamContext, generation: Generation, request: Request
    ) -> Response:
        collecting = asyncio.create_task(_drain(context, generation))
        # the body is read, so that the next thing to receive is the disconnect
        leaving = asyncio.create_task(_disconnect(request))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)  # nobody reads it; nginx's word for the log
            collecting.result()
            return JsonResponse(self.format_response(context))
        finally:
            collecting.cancel()
            leaving.cancel()


async def _drain(context: StreamContext, generation: Generation) -> None:
    async for index, event in generation:
        context.add(index, event)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def parse_object(body: bytes) -> dict[str, object]:
    """Read a body.

    Raises:
        InvalidRequestError: it is not a JSON object.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="bad_json") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object", code="bad_json")
    return data


def _raise_for(finish: Finish) -> None:
    if finish.reason is FinishReason.ERROR:
        raise InternalError(finish.message or "the engine failed")
    if finish.reason is FinishReason.CANCELLED:
        raise UnavailableError(finish.message or "the generation was cancelled", code="cancelled")


def _groups(choices: Sequence[Choice], size: int) -> Sequence[Sequence[Choice]]:
    return [choices[start : start + size] for start in range(0, len(choices), size)]


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0
