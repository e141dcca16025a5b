"""Anthropic's words for answers: blocks of thoughts, text and calls, streamed and in one piece."""

import base64
import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic_core import from_json
from sse_starlette import ServerSentEvent

from astrai_core.generation import FinishReason
from astrai_core.tokenizer import AutoTokenizer
from astrai_core.tokenizer.message_parsing import (
    ContentText,
    Delta,
    MessageParser,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from astrai_serve.api.anthropic_errors import error_body
from astrai_serve.api.anthropic_requests import (
    CountTokensRequest,
    MessagesRequest,
    parse,
)
from astrai_serve.api.errors import ApiError, ContextLengthError
from astrai_serve.api.generation_request import GenerationRequest
from astrai_serve.api.openai_requests import check_model
from astrai_serve.api.protocol import ProtocolHandler, StreamContext
from astrai_serve.api.sse import to_json
from astrai_serve.engine import TaskEvent


@dataclass(kw_only=True)
class Block:
    """A block of the answer as far as it has come."""

    kind: str
    text: str = ""
    """Text, thoughts, or a call's arguments as JSON."""
    id: str = ""
    name: str = ""
    is_complete: bool = True

    def start(self) -> dict[str, object]:
        """The block as it begins."""
        match self.kind:
            case "thinking":
                return {"type": "thinking", "thinking": "", "signature": ""}
            case "tool_use":
                return {"type": "tool_use", "id": self.id, "name": self.name, "input": {}}
            case _:
                return {"type": "text", "text": ""}

    def delta(self, text: str) -> dict[str, object]:
        """More of it."""
        match self.kind:
            case "thinking":
                return {"type": "thinking_delta", "thinking": text}
            case "tool_use":
                return {"type": "input_json_delta", "partial_json": text}
            case _:
                return {"type": "text_delta", "text": text}

    @property
    def signature(self) -> str:
        """A checksum: clients ask for one, and this server takes its own thoughts on trust."""
        return base64.b64encode(hashlib.sha256(self.text.encode()).digest()).decode()

    def whole(self) -> dict[str, object]:
        """The block in one piece."""
        match self.kind:
            case "thinking":
                return {"type": "thinking", "thinking": self.text, "signature": self.signature}
            case "tool_use":
                return self.start() | {"input": _arguments(self.text)}
            case _:
                return {"type": "text", "text": self.text}


@dataclass(kw_only=True)
class AnthropicContext(StreamContext):
    """The answer's blocks, and how it is taken apart."""

    parser: MessageParser
    is_window_limit: bool
    """The context ends before `max_tokens` does."""
    is_prefill_only: bool = False
    """Nothing is to be said: the prompt is read into the cache."""
    hides_thoughts: bool = False
    """Thoughts are told of and not shown."""
    blocks: list[Block] = field(default_factory=list[Block])
    is_open: bool = False
    """The last block goes on."""
    has_begun: bool = False

    def take(self, event: TaskEvent) -> Iterable[tuple[str, dict[str, object]]]:
        """Take in news of the answer and say it as events of blocks."""
        deltas = self.parser.feed(event.text)
        if event.finish is not None:
            deltas += self.parser.finish()
        for delta in () if self.is_prefill_only else deltas:
            yield from self._take(delta)
        if event.finish is not None:
            yield from self._close()

    def _take(self, delta: Delta) -> Iterable[tuple[str, dict[str, object]]]:
        match delta:
            case ReasoningText():
                text = "" if self.hides_thoughts else delta.text
                yield from self._go_on("thinking", text)
            case ContentText():
                yield from self._go_on("text", delta.text)
            case ToolCallStart():
                yield from self._open(
                    Block(kind="tool_use", id=f"toolu_{uuid.uuid4().hex[:24]}", name=delta.name)
                )
            case ToolCallArguments():
                yield from self._go_on("tool_use", delta.text)
            case ToolCallEnd():
                self.blocks[-1].is_complete = delta.is_complete
                yield from self._close()

    def _go_on(self, kind: str, text: str) -> Iterable[tuple[str, dict[str, object]]]:
        if not self.is_open or self.blocks[-1].kind != kind:
            yield from self._open(Block(kind=kind))
        block = self.blocks[-1]
        block.text += text
        if text:
            told = {"index": len(self.blocks) - 1, "delta": block.delta(text)}
            yield "content_block_delta", told

    def _open(self, block: Block) -> Iterable[tuple[str, dict[str, object]]]:
        yield from self._close()
        self.blocks.append(block)
        self.is_open = True
        told = {"index": len(self.blocks) - 1, "content_block": block.start()}
        yield "content_block_start", told

    def _close(self) -> Iterable[tuple[str, dict[str, object]]]:
        if not self.is_open:
            return
        index, block = len(self.blocks) - 1, self.blocks[-1]
        if block.kind == "thinking":
            delta = {"type": "signature_delta", "signature": block.signature}
            yield "content_block_delta", {"index": index, "delta": delta}
        yield "content_block_stop", {"index": index}
        self.is_open = False

    def usage(self) -> dict[str, int]:
        """Tokens; those found in the cache are told apart from the rest of the prompt."""
        cached = self.num_cached_tokens
        return {
            "input_tokens": self.request.num_prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": 0 if self.is_prefill_only else self.num_output_tokens,
        }

    def ending(self) -> dict[str, object]:
        """Why the answer ended; an end by length is told even where a call came before."""
        finish = self.choices[0].finish
        assert finish is not None
        reason = "end_turn"
        if self.is_prefill_only:
            reason = "max_tokens"
        elif finish.reason is FinishReason.LENGTH:
            reason = "model_context_window_exceeded" if self.is_window_limit else "max_tokens"
        elif finish.stop is not None:
            reason = "stop_sequence"
        elif any(block.kind == "tool_use" and block.is_complete for block in self.blocks):
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": finish.stop}


class MessagesHandler(ProtocolHandler):
    """POST /v1/messages: Anthropic's chat."""

    def salt_of(self, data: Mapping[str, object]) -> str | None:  # noqa: ARG002 - it has no word
        """Keys alone set cached prefixes apart."""
        return None

    def ping(self) -> ServerSentEvent:
        """Anthropic's own sign of life."""
        return ServerSentEvent(event="ping", data='{"type":"ping"}', sep="\n")

    def read(self, data: Mapping[str, object], salt: str) -> AnthropicContext:
        """Understand a body."""
        body: MessagesRequest = parse(MessagesRequest, data)
        check_model(body.model, self.settings.model_name)
        prompt = body.prompt(self.tokenizer, self.engine.max_context)
        room = self.engine.max_context - len(prompt.ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(prompt.ids)} tokens and leaves no room for an answer in a "
                f"context of {self.engine.max_context} tokens; shorten it",
                param="messages",
            )
        is_prefill_only = body.max_tokens == 0
        return AnthropicContext(
            request=GenerationRequest(
                prompts=(prompt.ids,),
                params=body.sampling(self.settings.defaults, prompt, room),
                stream=bool(body.stream),
                cache_salt=salt,
                structure_param=body.structure_param,
            ),
            response_id=f"msg_{uuid.uuid4().hex}",
            model=self.settings.model_name,
            parser=prompt.reading.parser(),
            is_window_limit=body.max_tokens > room,
            is_prefill_only=is_prefill_only,
            hides_thoughts=body.thinking is not None and body.thinking.display == "omitted",
        )

    def format_stream_start(self, context: StreamContext) -> Sequence[bytes]:  # noqa: ARG002
        """Nothing yet: how much of the prompt was cached is known with the first token."""
        return []

    def format_stream_event(
        self,
        context: StreamContext,
        index: int,  # noqa: ARG002 - there is one choice
        event: TaskEvent,
    ) -> Sequence[bytes]:
        """The start of the message, where it was not told, and what has come of its blocks."""
        assert isinstance(context, AnthropicContext)
        told: list[tuple[str, dict[str, object]]] = []
        if not context.has_begun:
            context.has_begun = True
            started = self._message(context) | {"stop_reason": None, "stop_sequence": None}
            told.append(("message_start", {"message": started}))
        return [_event(name, body) for name, body in (*told, *context.take(event))]

    def format_stream_end(self, context: StreamContext) -> Sequence[bytes]:
        """Why it ended, the final counts, and the end."""
        assert isinstance(context, AnthropicContext)
        delta = {"delta": context.ending(), "usage": context.usage()}
        return [_event("message_delta", delta), _event("message_stop", {})]

    def format_stream_error(self, error: ApiError) -> bytes:
        """The event that makes Anthropic's clients raise."""
        return f"event: error\ndata: {to_json(error_body(error, None))}\n\n".encode()

    def format_response(self, context: StreamContext) -> dict[str, object]:
        """The message with its blocks."""
        assert isinstance(context, AnthropicContext)
        choice = context.choices[0]
        for _ in context.take(TaskEvent(text=choice.text, finish=choice.finish)):
            pass
        content = [block.whole() for block in context.blocks]
        return self._message(context) | {"content": content} | context.ending()

    def _message(self, context: AnthropicContext) -> dict[str, object]:
        return {
            "id": context.response_id,
            "type": "message",
            "role": "assistant",
            "model": context.model,
            "content": [],
            "usage": context.usage(),
        }


def count_tokens(
    data: Mapping[str, object], tokenizer: AutoTokenizer, model_name: str, max_context: int
) -> dict[str, object]:
    """Count the tokens of a prompt, as POST /v1/messages would read it.

    Raises:
        ApiError: the body is wrong.
    """
    body: CountTokensRequest = parse(CountTokensRequest, data)
    check_model(body.model, model_name)
    return {"input_tokens": len(body.prompt(tokenizer, max_context).ids)}


def _event(name: str, body: Mapping[str, object]) -> bytes:
    return f"event: {name}\ndata: {to_json({'type': name, **body})}\n\n".encode()


def _arguments(text: str) -> dict[str, object]:
    """What came of a call's arguments, which may have been cut off."""
    try:
        read = from_json(text or "{}", allow_partial=True)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}
