"""POST /v1/completions: text that goes on where the prompt ends."""

from collections.abc import Mapping, Sequence

from astrai_serve.api.openai import (
    OpenAIContext,
    OpenAIHandler,
    TextOffsets,
    ending,
    finite,
)
from astrai_serve.api.openai_requests import parse_completion
from astrai_serve.api.protocol import StreamContext
from astrai_serve.engine import TaskEvent, TokenLogprob


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
        told = self.progress(context)
        has_ids = context.request.tells_token_ids and event.token_ids
        if not (event.text or event.logprobs or has_ids or event.finish):
            return told
        choice = {
            "index": index,
            "text": event.text,
            "logprobs": self._logprobs(context, index, event.logprobs),
            "finish_reason": None,
        }
        is_first = context.choices[index].num_tokens == len(event.token_ids)
        choice |= self.token_id_entries(context, index, event.token_ids, is_first)
        if event.finish is not None:
            choice |= ending(event.finish)
        return [*told, self.chunk(context, choice)]

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
        entries |= self.token_id_entries(context, index, choice.token_ids, is_first=True)
        return entries | self.prompt_entries(context, index) | ending(choice.finish)

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
            "token_logprobs": [finite(one.logprob) for one in logprobs],
            "top_logprobs": [
                # the chosen token has its own entry, however unlikely it was
                {
                    self._token(token_id): finite(logprob)
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
