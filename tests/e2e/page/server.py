"""A small server that serves the real chat page and says whatever a test scripts."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from astrai_serve.api import bind
from astrai_serve.api.page import add_page

Body = dict[str, Any]
Answer = Callable[[Body], Response]

MODEL = {"id": "tiny", "object": "model", "created": 1764201600, "owned_by": "astrai"}


def event(content: object) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def delta(**fields: object) -> str:
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


def ending(reason: str = "stop", **figures: object) -> str:
    end = event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    return end + event({"choices": [], **figures}) + "data: [DONE]\n\n"


def usage(prompt: int, output: int, cached: int = 0) -> dict[str, object]:
    details = {"cached_tokens": cached}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "prompt_tokens_details": details,
    }


def error(status: int, code: str, message: str, **headers: str) -> Response:
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return JSONResponse(body, status, headers={k.replace("_", "-"): v for k, v in headers.items()})


def stream(*parts: str | float | threading.Event) -> Response:
    """An answer in events; a number lets so many seconds pass, an event waits until it is set."""

    async def send() -> AsyncIterator[str]:
        for part in parts:
            if isinstance(part, str):
                yield part
            elif isinstance(part, threading.Event):
                while not part.is_set():
                    await asyncio.sleep(0.01)
            else:
                await asyncio.sleep(part)

    return StreamingResponse(send(), media_type="text/event-stream")


def text(content: str, size: int = 7, pause: float = 0.0, **figures: Any) -> Response:
    """A whole answer, a few characters at a time."""
    figures = figures or {"usage": usage(12, len(content), 4)}
    parts: list[str | float] = []
    for start in range(0, len(content), size):
        parts += [delta(content=content[start : start + size]), pause]
    return stream(*parts, ending(**figures))


class PageServer:
    """Serves the page, and answers with what is next in `script`, or echoes."""

    def __init__(self, port: int = 0) -> None:
        self.script: list[Answer | Response] = []
        self.bodies: list[Body] = []
        self.key = ""
        self.models: list[Body] = [{**MODEL, "max_input_tokens": 4096, "max_tokens": 4096}]
        app = FastAPI()
        add_page(app, {"name": "fake"})
        app.add_api_route("/v1/models", self._models, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        self._listener = bind("127.0.0.1", port)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))

    async def _models(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"object": "list", "data": self.models})

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        if not self.script:
            return text(f"echo: {body['messages'][-1]['content']}")
        answer = self.script.pop(0)
        return answer if isinstance(answer, Response) else answer(body)

    def _refusal(self, request: Request) -> Response | None:
        if not self.key or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return error(401, "invalid_api_key", "this server asks for an API key")

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true."""
        for _ in range(500):
            if condition():
                return
            threading.Event().wait(0.01)
        raise AssertionError("it does not happen")

    def wait_left(self) -> None:
        """Wait until no answer is under way."""
        self.wait(lambda: len(self._server.server_state.tasks) == 0)

    def __enter__(self) -> "PageServer":
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            threading.Event().wait(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.force_exit = self._server.should_exit = True
        self._thread.join()
        self._listener.close()
