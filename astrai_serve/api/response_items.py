"""Items of a response, built from deltas, and the events that tell of each step.

A response in one piece goes through the same steps with nobody listening, so that it holds just
what its stream would have told. Items never overlap: thoughts, a message, calls, in their order.
"""

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from astrai_core.tokenizer.message_parsing import (
    ContentText,
    Delta,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from astrai_serve.api.responses_requests import sealed

Event = dict[str, Any]

_PART = "content_part"


class ResponseItems:
    """The output of one response.

    Args:
        seals_thoughts: thoughts also come sealed, for clients that keep no plain ones.
        call_ids: makes the id of a call from its number.
    """

    def __init__(self, *, seals_thoughts: bool, call_ids: Callable[[int], str]):
        self.output: list[dict[str, Any]] = []
        """Items so far; the last may be open."""
        self._seals_thoughts = seals_thoughts
        self._call_ids = call_ids
        self._open: str | None = None  # type of the item that is open

    def add(self, delta: Delta, logprobs: Sequence[Event] = ()) -> list[Event]:
        """Take a delta in and return its events.

        Args:
            delta: what the model says.
            logprobs: of the tokens it came with; they go with content.
        """
        match delta:
            case ReasoningText():
                return [*self._go_on_with("reasoning"), *self._more(delta.text, None)]
            case ContentText():
                return [*self._go_on_with("message"), *self._more(delta.text, list(logprobs))]
            case ToolCallStart():
                return [*self.close(), *self._begin_call(delta)]
            case ToolCallArguments():
                self._item["arguments"] += delta.text
                return [self._about("function_call_arguments.delta", delta=delta.text)]
            case ToolCallEnd():
                return self.close("completed" if delta.is_complete else "incomplete")

    def close(self, status: str = "completed") -> list[Event]:
        """End the item that is open, if one is, and return the events of that."""
        if self._open is None:
            return []
        item, kind, self._open = self._item, self._open, None
        item["status"] = status
        events: list[Event] = []
        if kind == "function_call":
            told = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._about("function_call_arguments.done", **told))
        else:
            part = item["content"][0]
            name = "output_text" if kind == "message" else "reasoning_text"
            more = {"logprobs": part["logprobs"]} if kind == "message" else {}
            events.append(self._about(f"{name}.done", content_index=0, text=part["text"], **more))
            events.append(self._about(f"{_PART}.done", content_index=0, part=_copy(part)))
        if kind == "reasoning" and self._seals_thoughts:
            item["encrypted_content"] = sealed(item["content"][0]["text"])
        return [*events, self._of_item("output_item.done")]

    def finish(self, is_cut_off: bool) -> list[Event]:
        """End the output; one that says nothing at all is an empty message."""
        events = [] if self.output else self._begin("message")
        return events + self.close("incomplete" if is_cut_off else "completed")

    @property
    def _item(self) -> dict[str, Any]:
        return self.output[-1]

    def _go_on_with(self, kind: str) -> list[Event]:
        """Events of closing another item and opening one of this type, unless it is open."""
        return [] if self._open == kind else [*self.close(), *self._begin(kind)]

    def _begin(self, kind: str) -> list[Event]:
        self._open = kind
        prefix = {"message": "msg", "reasoning": "rs"}[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "content": []}
        item |= {"role": "assistant"} if kind == "message" else {"summary": []}
        self.output.append(item | {"status": "in_progress"})
        added = self._of_item("output_item.added")
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._item["content"].append(part)
        return [added, self._about(f"{_PART}.added", content_index=0, part=_copy(part))]

    def _begin_call(self, delta: ToolCallStart) -> list[Event]:
        self._open = "function_call"
        self.output.append(
            {
                "id": f"fc_{uuid.uuid4().hex}",
                "type": "function_call",
                "call_id": self._call_ids(delta.index),
                "name": delta.name,
                "arguments": "",
                "status": "in_progress",
            }
        )
        return [self._of_item("output_item.added")]

    def _more(self, text: str, logprobs: list[Event] | None) -> list[Event]:
        part = self._item["content"][0]
        part["text"] += text
        if logprobs is None:
            return [self._about("reasoning_text.delta", content_index=0, delta=text)]
        part["logprobs"] += logprobs
        return [
            self._about("output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))
        ]

    def _about(self, name: str, /, **fields: object) -> Event:
        place = {"item_id": self._item["id"], "output_index": len(self.output) - 1}
        return {"type": f"response.{name}", **place, **fields}

    def _of_item(self, name: str) -> Event:
        item = {**self._item}
        if "content" in item:
            item["content"] = [_copy(part) for part in item["content"]]
        return {"type": f"response.{name}", "output_index": len(self.output) - 1, "item": item}


def _copy(part: dict[str, Any]) -> dict[str, Any]:
    return {**part, "logprobs": list(part["logprobs"])} if "logprobs" in part else {**part}
