"""One line in the log for each request: who, what, how long, how many tokens. Never its text."""

import json
import logging
import time
from datetime import UTC, datetime

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astrai_serve.api.auth import client_of
from astrai_serve.api.settings import ServerSettings

logger = logging.getLogger("astrai_serve.requests")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class RequestLog:
    """Logs a request when its response is over.

    Handlers add to `scope["state"]["log"]` what they know: counts and reasons, no text.

    Args:
        app: what answers.
        settings: the keys, of which the log tells only which one it was.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        known: dict[str, object] = scope.setdefault("state", {}).setdefault("log", {})
        status = 0  # of a response that never began

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noting_status)
        finally:
            client = scope.get("client") or ("", 0)
            fields = {
                "request_id": scope["state"].get("request_id"),
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.perf_counter() - began, 4),
                "address": client[0],
                "key": client_of(Headers(scope=scope), self.settings.api_keys),
                **known,
            }
            logger.info("request", extra=fields)


class JsonFormatter(logging.Formatter):
    """Each record as a JSON object on a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record with the fields that came with it."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=True, default=str)


class TextFormatter(logging.Formatter):
    """Level, logger and message, then the fields that came with it as key=value."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        told = [f"{key}={value!s}" for key, value in _extra(record).items()]
        return " ".join([super().format(record), *(text.replace("\n", " ") for text in told)])


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
