"""One line in the log for each request: who, what, how long, how many tokens. Never its text."""

import logging
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astrai_serve.api.auth import client_of
from astrai_serve.api.settings import ServerSettings

logger = logging.getLogger("astrai_serve.requests")


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
