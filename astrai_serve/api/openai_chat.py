"""POST /v1/chat/completions: messages, thoughts and calls of tools, streamed and in one piece."""

import hashlib
from collections.abc import Mapping, Sequence

from astrai_core.generation import FinishReason
from astrai_core.tokenizer.message_parsing import (
    ContentText,
    Delta,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from astrai_serve.api.openai import OpenAIContext, OpenAIHandler, ending, finite, spoken
from astrai_serve.api.openai_requests import parse_chat
from astrai_serve.api.protocol import Choice, StreamContext
from astrai_serve.engine import Finish, TaskEvent, TokenLogprob


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
        """What is new, piece by piece, then the reason of the end in an event of its own."""
        chunks = [*self.progress(context)]
        choice = context.choices[index]
        logprobs = self._logprobs(spoken(event.logprobs, event.finish))
        deltas = [told for one in choice.deltas if (told := self._delta(context, index, one))]
        if not deltas and event.token_ids and (logprobs or context.request.tells_token_ids):
            deltas = [{"content": ""}]
        for n, delta in enumerate(deltas):
            entry = self._choice(index, delta, logprobs if n == 0 else None)
            if n == 0:
                is_first = choice.num_tokens == len(event.token_ids)
                entry |= self.token_id_entries(context, index, event.token_ids, is_first)
            chunks.append(self.chunk(context, entry))
        if event.finish is not None:
            end = self._choice(index, {}) | _chat_ending(choice, event.finish)
            chunks.append(self.chunk(context, end))
        return chunks

    def format_response(self, context: StreamContext) -> dict[str, object]:
        """All choices with their messages."""
        messages = [
            self._answer(context, index, choice) | self.prompt_entries(context, index)
            for index, choice in enumerate(context.choices)
        ]
        return self.whole(context, messages)

    def _answer(self, context: StreamContext, index: int, choice: Choice) -> dict[str, object]:
        assert choice.finish is not None
        said = choice.message
        message: dict[str, object] = {
            "role": "assistant",
            "content": said.content or (None if said.calls else ""),
            "refusal": None,
        }
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [
                {
                    "id": call_id(context, index, n),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for n, call in enumerate(said.calls)
            ]
        logprobs = self._logprobs(spoken(choice.logprobs, choice.finish))
        entries: dict[str, object] = {"index": index, "message": message, "logprobs": logprobs}
        entries |= self.token_id_entries(context, index, choice.token_ids, is_first=True)
        return entries | _chat_ending(choice, choice.finish)

    def _delta(self, context: StreamContext, index: int, delta: Delta) -> dict[str, object] | None:
        """A delta in OpenAI's words; None where they have none for it."""
        match delta:
            case ReasoningText():
                return {"reasoning_content": delta.text}
            case ContentText():
                return {"content": delta.text}
            case ToolCallStart():
                call = {
                    "index": delta.index,
                    "id": call_id(context, index, delta.index),
                    "type": "function",
                    # clients join what repeats, so the name comes once and the id too
                    "function": {"name": delta.name, "arguments": ""},
                }
                return {"tool_calls": [call]}
            case ToolCallArguments():
                call = {"index": delta.index, "function": {"arguments": delta.text}}
                return {"tool_calls": [call]}
            case ToolCallEnd():
                return None

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
        return {"token": text, "bytes": list(content), "logprob": finite(logprob)}


def call_id(context: StreamContext, index: int, call: int) -> str:
    """The id of a call, the same whenever it is asked for."""
    digest = hashlib.sha256(f"{context.response_id}:{index}:{call}".encode()).hexdigest()
    reading = context.request.reading
    style = None if reading is None else reading.format.tools
    # Mistral's templates take nine letters and digits and nothing else
    return digest[:9] if style in ("mistral", "mistral_named") else f"call_{digest[:24]}"


def _chat_ending(choice: Choice, finish: Finish) -> dict[str, object]:
    """An answer that was cut off says so, whatever it called before."""
    told = ending(finish)
    if choice.message.calls and finish.reason is FinishReason.STOP:
        told["finish_reason"] = "tool_calls"
    return told
