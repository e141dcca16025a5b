"""What stands between the socket and the routes: request ids, Host, keys and body size.

Plain ASGI, because Starlette's `BaseHTTPMiddleware` hides the client's disconnect from the routes.
"""

import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astrai_serve.api.auth import check_key
from astrai_serve.api.errors import ApiError, BodyTooLargeError, ForbiddenError, MediaTypeError
from astrai_serve.api.settings import ServerSettings

_OPEN_PATHS = frozenset({"/", "/health", "/ready"})
_OPEN_PREFIX = "/web/"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIds:
    """Gives each response the request's `x-request-id`, or a fresh one.

    Anthropic's clients read it from `request-id`.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class Guard:
    """Refuses what may not come in before anything of it is read.

    Args:
        app: what is guarded.
        settings: who may come in.
        refuse: makes the response for a refusal.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, refuse: Callable[[ApiError, Scope], Response]
    ):
        self.app = app
        self.settings = settings
        self.refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            path: str = scope["path"]
            if path not in _OPEN_PATHS and not path.startswith(_OPEN_PREFIX):
                check_key(headers, self.settings.api_keys)
            self._check_body(scope["method"], headers)
        except ApiError as error:
            await self.refuse(error, scope)(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _check_host(self, headers: Headers) -> None:
        """A web page whose name was pointed at this address carries its own name as Host."""
        allowed = self.settings.allowed_hosts
        host = _without_port(headers.get("host", ""))
        if allowed is not None and host and host not in allowed:
            raise ForbiddenError(
                f"this server does not answer to the name {host!r}; "
                "start it with --allowed_hosts to add names"
            )

    def _check_body(self, method: str, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.settings.max_body_bytes:
            raise self._too_large()
        # a page of another origin can post anything but JSON without asking the browser first
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and media_type != "application/json":
            raise MediaTypeError(
                f"content-type must be application/json, not {media_type or 'absent'!r} "
                "(curl: -H 'Content-Type: application/json')"
            )

    def _limited(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.settings.max_body_bytes:
                raise self._too_large()
            return message

        return receive_limited

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the request is larger than the {self.settings.max_body_bytes} bytes this server reads"
        )


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower().rstrip(".")
