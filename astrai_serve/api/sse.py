"""Server-sent events as clients out there read them: one JSON object an event, lines ended by LF.

sse-starlette cuts streams at the first signal unless it is told not to; ending them is our own
`Shutdown`'s business, so its drain is switched off on import.
"""

import json
import logging
import re
from collections.abc import AsyncIterator, Callable

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus, SendTimeoutError
from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

AppStatus.disable_automatic_graceful_drain()

DONE = b"data: [DONE]\n\n"
SEND_SECONDS = 120.0
"""A client that takes no byte for so long is gone."""

# str.splitlines() ends a line at these too, and clients use it; JSON allows them raw
_LINE_ENDS = re.compile("[\x7f-\x9f\u2028\u2029]")


def to_json(content: object) -> str:
    """Write JSON on one line, whatever a client takes for a line's end; Chinese stays as it is."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text if text.isascii() else _LINE_ENDS.sub(_escape, text)


def event(content: object) -> bytes:
    """One event with `content` as its data."""
    return f"data: {to_json(content)}\n\n".encode()


class EventStream(EventSourceResponse):
    """A response of events that says when it is over, however it ends.

    Args:
        events: encoded events, each with its blank line.
        on_close: called once at the end, also when the client left before the first event, where
            an iterator that never ran has no `finally` to rely on.
        ping_seconds: a sign of life is sent so often, to keep the connection through a long
            prefill.
        ping: makes the sign.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        on_close: Callable[[], None],
        ping_seconds: float,
        ping: Callable[[], ServerSentEvent],
    ):
        super().__init__(
            events,
            ping=ping_seconds,
            ping_message_factory=ping,
            sep="\n",
            send_timeout=SEND_SECONDS,
        )
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.warning("a client took no byte for %.0f s and is cut off", SEND_SECONDS)
        finally:
            self._on_close()


def comment() -> ServerSentEvent:
    """A line that every reader of server-sent events skips."""
    return ServerSentEvent(comment="ping", sep="\n")


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"
