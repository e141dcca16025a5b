"""A server to talk to, over OpenAI's protocol as far as servers agree on it."""

import contextlib
import json
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx2

from astrai_serve.chat.events import server_events
from astrai_serve.chat.options import ChatOptions

KEY_VARIABLE = "ASTRAI_API_KEY"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# servers call what a model thinks before it answers by either name
_THOUGHTS = ("reasoning_content", "reasoning")


class ChatError(Exception):
    """What the user should read instead of an answer."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What comes next in a stream: some text, a thought, or a sign of life."""

    kind: Literal["text", "thought", "alive"]
    text: str = ""
    """For a sign of life, how far the prompt has been read, if the server tells."""


@dataclass(kw_only=True)
class Answer:
    """What one stream said beside its text."""

    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict[str, Any])
    timings: dict[str, Any] = field(default_factory=dict[str, Any])
    began: float | None = None
    """When the first text came, in seconds of the monotonic clock."""
    ended: float = 0.0
    """When the latest text came."""

    @property
    def tokens_per_second(self) -> float | None:
        """The server's figure, or what was seen from here."""
        if speed := self.timings.get("predicted_per_second"):
            return speed
        tokens = self.usage.get("completion_tokens") or 0
        spent = self.ended - (self.began or self.ended)
        return (tokens - 1) / spent if tokens > 1 and spent > 0 else None

    def hear(self) -> None:
        """Note that text has come."""
        self.ended = time.monotonic()
        self.began = self.began or self.ended

    def __str__(self) -> str:
        """Name what there is to know, in a few words."""
        notes: list[str] = []
        if tokens := self.usage.get("completion_tokens"):
            notes.append(f"{tokens} tokens")
        if speed := self.tokens_per_second:
            notes.append(f"{speed:.0f} tokens/s")
        if cached := (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens"):
            notes.append(f"{cached} of {self.usage.get('prompt_tokens')} prompt tokens cached")
        if self.finish_reason not in ("stop", None):
            notes.append(f"ended by {self.finish_reason}")
        return ", ".join(notes)


class Client:
    """A server to talk to.

    Args:
        options: where it is and how to ask.
        transport: what carries the requests, if not the network.
    """

    def __init__(self, options: ChatOptions, transport: httpx2.BaseTransport | None = None):
        self.options = options
        headers = {}
        if key := _api_key(options.api_key_file):
            headers["authorization"] = f"Bearer {key}"
        # a long prefill is silent where a server sends no pings
        timeout = httpx2.Timeout(600, connect=5)
        self._http = httpx2.Client(
            base_url=options.base,
            headers=headers,
            timeout=timeout,
            transport=transport,
            # a proxy of the environment leads out of this machine, and never back to it
            trust_env=options.host not in _LOOPBACK,
        )
        self.model = options.model
        # not every server knows how to count in a stream
        self._extras: dict[str, object] = {"stream_options": {"include_usage": True}}

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def connect(self) -> None:
        """Find the server and its model.

        Raises:
            ChatError: nobody answers, or not as a server of models does.
        """
        with self._told():
            response = self._http.get("/models")
            _check(response)
            models = response.json()["data"]
            self.model = self.model or str(models[0]["id"])

    def answer(
        self, messages: Sequence[dict[str, str]], answer: Answer
    ) -> Generator[Piece, None, None]:
        """Yield an answer as it comes, and note the rest in `answer`.

        Raises:
            ChatError: the server refuses or breaks off.
        """
        with self._told(), self._open(messages) as response:
            for data in server_events(response.iter_bytes()):
                if data == "[DONE]":
                    return
                yield from self._pieces(None if data is None else json.loads(data), answer)
        if answer.finish_reason is None:
            raise ChatError("the server closed the connection in the middle of the answer")

    @contextlib.contextmanager
    def _open(self, messages: Sequence[dict[str, str]]) -> Iterator[httpx2.Response]:
        """Ask, without `stream_options` from a server that refuses them."""
        with contextlib.ExitStack() as stack:
            while True:
                request = self._http.stream("POST", "/chat/completions", json=self._body(messages))
                response = stack.enter_context(request)
                if response.is_error:
                    response.read()
                    if self._extras and "stream_options" in response.text:
                        self._extras = {}
                        continue
                _check(response)
                yield response
                return

    def _body(self, messages: Sequence[dict[str, str]]) -> dict[str, object]:
        options = self.options
        wishes = {
            "temperature": options.temperature,
            "seed": options.seed,
            "max_tokens": options.max_tokens,
        }
        told = {name: value for name, value in wishes.items() if value is not None}
        fixed = {"model": self.model, "messages": list(messages), "stream": True}
        return fixed | self._extras | told

    def _pieces(self, chunk: Mapping[str, Any] | None, answer: Answer) -> Iterator[Piece]:
        if chunk is None:
            yield Piece(kind="alive")
            return
        if "error" in chunk:
            raise ChatError(_message_of(chunk))
        answer.usage = chunk.get("usage") or answer.usage
        answer.timings = chunk.get("timings") or answer.timings
        if progress := chunk.get("prompt_progress"):
            read = f"{progress.get('processed')} of {progress.get('total')} prompt tokens read"
            yield Piece(kind="alive", text=read)
        for choice in chunk.get("choices") or []:
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            delta = choice.get("delta") or {}
            for thought in filter(None, (delta.get(name) for name in _THOUGHTS)):
                answer.hear()
                yield Piece(kind="thought", text=thought)
                break
            if text := delta.get("content"):
                answer.hear()
                yield Piece(kind="text", text=text)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say what went wrong on the way in words."""
        url = self.options.url
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise ChatError(
                f"no server answers at {url} ({error}); start one with "
                "astrai-serve --model FOLDER, or name another with --url"
            ) from None
        except httpx2.TimeoutException:
            raise ChatError(f"the server at {url} has been silent for too long") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ChatError(f"the connection to {url} broke: {error}") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ChatError(
                f"what {url} answers is not OpenAI's protocol ({type(error).__name__}: {error})"
            ) from None


def _check(response: httpx2.Response) -> None:
    if not response.is_error:
        return
    try:
        message = _message_of(response.json())
    except (ValueError, LookupError, TypeError, AttributeError):
        message = response.text[:200]
    later = response.headers.get("retry-after", "")
    when = f"; try again in {later} s" if later.isdigit() else ""
    raise ChatError(f"the server answers {response.status_code}: {message}{when}")


def _message_of(body: Mapping[str, Any]) -> str:
    error = body["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def _api_key(path: Path | None) -> str:
    if path is None:
        return os.environ.get(KEY_VARIABLE, "")
    if not path.is_file():
        raise ChatError(f"--api_key_file {path} does not exist")
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    return next((line for line in lines if line and not line.startswith("#")), "")
