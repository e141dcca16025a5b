"""POST /v1/responses: OpenAI's items and typed events, without any state between requests."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from astrai_core.generation import FinishReason
from astrai_core.tokenizer.message_parsing import ContentText
from astrai_serve.api.errors import ApiError
from astrai_serve.api.openai import OpenAIHandler, finite, num_thought_tokens, spoken
from astrai_serve.api.openai_chat import call_id
from astrai_serve.api.openai_parameters import check_model
from astrai_serve.api.protocol import StreamContext
from astrai_serve.api.response_items import Event, ResponseItems
from astrai_serve.api.responses_requests import ENCRYPTED, ResponseRequest, parse_response
from astrai_serve.api.sse import to_json
from astrai_serve.engine import TaskEvent, TokenLogprob


@dataclass(kw_only=True)
class ResponseContext(StreamContext):
    """What is remembered of one request."""

    body: ResponseRequest
    handler: "ResponsesHandler"
    items: ResponseItems = field(init=False)
    steps: list[Event] = field(default_factory=list[Event])
    """What the last event made of the items."""
    num_events: int = 0
    """Events told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.items = ResponseItems(
            seals_thoughts=ENCRYPTED in (self.body.include or ()),
            call_ids=lambda call: call_id(self, 0, call),
        )

    def add(self, index: int, event: TaskEvent) -> None:
        """Take in an event and build the items, whether or not somebody hears of the steps."""
        super().add(index, event)
        logprobs: Sequence[Event] = []
        if self.body.tells_logprobs:
            logprobs = self.handler.likely(spoken(event.logprobs, event.finish))
        self.steps = []
        for delta in self.choices[0].deltas:
            self.steps += self.items.add(delta, logprobs)
            if isinstance(delta, ContentText):
                logprobs = []  # told once
        if event.finish is not None:
            self.steps += self.items.finish(event.finish.reason is FinishReason.LENGTH)


class ResponsesHandler(OpenAIHandler):
    """POST /v1/responses; nothing is stored, so no response can be retrieved or gone on with."""

    def read(self, data: Mapping[str, object], salt: str) -> ResponseContext:
        """Understand a body."""
        body = parse_response(data)
        check_model(body.model, self.settings.model_name)
        return ResponseContext(
            request=body.to_generation(self.engine, self.tokenizer, self.settings.defaults, salt),
            response_id=f"resp_{uuid.uuid4().hex}",
            model=self.settings.model_name,
            body=body,
            handler=self,
        )

    def format_stream_start(self, context: StreamContext) -> Sequence[bytes]:
        """The response before it has begun."""
        begun = self._response(context, "in_progress")
        events = [{"type": f"response.{name}", "response": begun} for name in _BEGINNING]
        return [_encode(context, event) for event in events]

    def format_stream_event(
        self, context: StreamContext, index: int, event: TaskEvent
    ) -> Sequence[bytes]:
        """The steps that the news makes of it."""
        del index, event
        assert isinstance(context, ResponseContext)
        return [_encode(context, step) for step in context.steps]

    def format_stream_end(self, context: StreamContext) -> Sequence[bytes]:
        """The whole response."""
        status = _status(context)
        event = {"type": f"response.{status}", "response": self._response(context, status)}
        return [_encode(context, event)]

    def format_stream_failure(self, context: StreamContext, error: ApiError) -> Sequence[bytes]:
        """An error twice: the SDK yields the first event, and its helpers look for the second."""
        told = {"code": error.code or error.type, "message": error.message}
        failed = self._response(context, "failed") | {"error": told}
        return [
            _encode(context, {"type": "error", **told, "param": error.param}),
            _encode(context, {"type": "response.failed", "response": failed}),
        ]

    def format_response(self, context: StreamContext) -> dict[str, object]:
        """The whole response."""
        return self._response(context, _status(context))

    def likely(self, logprobs: Sequence[TokenLogprob]) -> list[Event]:
        """Log-probabilities of tokens and of the most likely ones in their places."""

        def entry(token_id: int, logprob: float) -> Event:
            text, content = self.token_text(token_id)
            return {"token": text, "bytes": list(content), "logprob": finite(logprob)}

        return [
            entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*top) for top in one.top]}
            for one in logprobs
        ]

    def _response(self, context: StreamContext, status: str) -> dict[str, Any]:
        assert isinstance(context, ResponseContext)
        body, params = context.body, context.request.params
        is_over = status in ("completed", "incomplete")
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        choice, text = body.tool_choice, body.text
        return {
            "id": context.response_id,
            "object": "response",
            "created_at": context.created,
            "completed_at": None,
            "status": status,
            "model": context.model,
            "output": list(context.items.output) if status != "in_progress" else [],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "background": False,
            "store": False,
            "reasoning": {
                "effort": body.reasoning.effort if body.reasoning else None,
                "summary": None,
            },
            "service_tier": "flex" if body.service_tier == "flex" else "default",
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "text": {
                "format": text.format.model_dump(by_alias=True, exclude_none=True)
                if text is not None and text.format is not None
                else {"type": "text"}
            },
            "tool_choice": choice.model_dump()
            if choice is not None and not isinstance(choice, str)
            else choice or "auto",
            "tools": tools,
            "truncation": "disabled",
            "usage": _usage(context) if is_over else None,
            "user": body.user,
            **({"timings": context.timings()} if is_over else {}),
        }


_BEGINNING = ("created", "in_progress")


def _status(context: StreamContext) -> str:
    finish = context.choices[0].finish
    assert finish is not None
    return "incomplete" if finish.reason is FinishReason.LENGTH else "completed"


def _usage(context: StreamContext) -> dict[str, object]:
    prompt, output = context.request.num_prompt_tokens, context.num_output_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": context.num_cached_tokens},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": num_thought_tokens(context)},
        "total_tokens": prompt + output,
    }


def _encode(context: StreamContext, event: Event) -> bytes:
    """An event with its number and, for those who look for it, its name."""
    assert isinstance(context, ResponseContext)
    numbered = {"type": event["type"], "sequence_number": context.num_events, **event}
    context.num_events += 1
    return f"event: {event['type']}\ndata: {to_json(numbered)}\n\n".encode()
