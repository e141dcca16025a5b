"""`astrai-chat`: a conversation in the terminal with any OpenAI-compatible server.

Ctrl-C stops the answer and keeps what was said so far; at the prompt it drops the line. Without a
terminal at its input it sends that input as one message and prints the answer, for pipes.
"""

import contextlib
import json
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx2

from astrai_core.command_line import CommandLineError, parse_one

PROGRAM = "astrai-chat"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
KEY_VARIABLE = "ASTRAI_API_KEY"
_HELP = """\
/system [TEXT]  show the system prompt, or set it and begin anew
/retry          answer the last message again
/clear          forget the conversation
/help           this list
/quit           leave (also Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Chat in the terminal with astrai-serve, or with any server that speaks OpenAI's protocol."""

    url: str = "http://127.0.0.1:8000"
    """Address of the server, with or without /v1."""
    model: str = ""
    """Model to ask for; empty takes the server's first one."""
    system: str = ""
    """System prompt."""
    temperature: float | None = None
    """0 always takes the most likely token; null leaves it to the server."""
    max_tokens: int | None = None
    """Longest answer; null leaves it to the server."""
    seed: int | None = None
    """Makes answers reproducible."""
    api_key_file: Path | None = None
    """File that holds the API key; without it the variable ASTRAI_API_KEY counts."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url must start with http:// or https://, not {self.url!r}")
        try:
            httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"--url {self.url}: {error}") from None

    @property
    def host(self) -> str:
        """Name or address of the server."""
        return httpx2.URL(self.url).host

    @property
    def base(self) -> str:
        """Address of the protocol."""
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else url + "/v1"


class ChatError(Exception):
    """What the user should read instead of an answer."""


@dataclass(kw_only=True)
class Answer:
    """What one stream said beside its text."""

    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict[str, Any])
    timings: dict[str, Any] = field(default_factory=dict[str, Any])

    def __str__(self) -> str:
        """Name what there is to know, in a few words."""
        notes: list[str] = []
        if tokens := self.usage.get("completion_tokens"):
            notes.append(f"{tokens} tokens")
        if speed := self.timings.get("predicted_per_second"):
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
    ) -> Generator[str, None, None]:
        """Yield the text of an answer as it comes, and note the rest in `answer`.

        Raises:
            ChatError: the server refuses or breaks off.
        """
        options = self.options
        body: dict[str, object] = {"model": self.model, "messages": list(messages), "stream": True}
        body["stream_options"] = {"include_usage": True}
        wishes = {"temperature": options.temperature, "seed": options.seed}
        wishes["max_tokens"] = options.max_tokens
        body |= {name: value for name, value in wishes.items() if value is not None}
        with self._told(), self._http.stream("POST", "/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
            _check(response)
            for data in server_events(response.iter_bytes()):
                if data == "[DONE]":
                    return
                yield from self._text(json.loads(data), answer)
        if answer.finish_reason is None:
            raise ChatError("the server closed the connection in the middle of the answer")

    def _text(self, chunk: dict[str, Any], answer: Answer) -> Iterator[str]:
        if "error" in chunk:
            raise ChatError(_message_of(chunk))
        answer.usage = chunk.get("usage") or answer.usage
        answer.timings = chunk.get("timings") or answer.timings
        for choice in chunk.get("choices") or []:
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            if text := (choice.get("delta") or {}).get("content"):
                yield text

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


def server_events(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the data of each server-sent event.

    Lines end at LF, CR or both and nowhere else: text may hold other characters that Python takes
    for the end of a line.
    """
    data: list[str] = []
    for line in _lines(chunks):
        if not line and data:
            yield "\n".join(data)
            data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" ").decode())
    if data:
        yield "\n".join(data)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        # a CR at the very end may be half of a CR LF
        rest = (rest + chunk).replace(b"\r\n", b"\n")
        whole, last = (rest[:-1], b"\r") if rest.endswith(b"\r") else (rest, b"")
        *lines, rest = whole.replace(b"\r", b"\n").split(b"\n")
        rest += last
        yield from lines
    yield from rest.replace(b"\r", b"\n").split(b"\n")


class Conversation:
    """What was said, and the words to steer it."""

    def __init__(self, client: Client, system: str):
        self.client = client
        self.system = system
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> None:
        """Send a message and show the answer; one that fails leaves no trace."""
        if not _is_unicode(text):
            _note(
                f"that is not {sys.stdin.encoding}: set the terminal to it, or LANG to the terminal"
            )
            return
        self.messages.append({"role": "user", "content": text})
        try:
            said = self._show_answer()
        except ChatError as error:
            self.messages.pop()
            _note(str(error))
        else:
            self.messages.append({"role": "assistant", "content": said})

    def retry(self) -> None:
        """Answer the last message again."""
        if not self.messages:
            _note("there is nothing to answer again")
            return
        before = self.messages.copy()
        del self.messages[-2:]
        self.say(before[-2]["content"])
        if len(self.messages) < len(before):
            self.messages = before

    def clear(self) -> None:
        """Forget what was said, but not the system prompt."""
        self.messages.clear()
        _note("a new conversation")

    def set_system(self, text: str) -> None:
        """Show the system prompt, or set it and begin anew."""
        if text:
            self.system = text
            self.clear()
        else:
            _note(self.system or "there is no system prompt")

    def prompt(self) -> list[dict[str, str]]:
        """All that is sent."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages

    def _show_answer(self) -> str:
        answer, said = Answer(), ""
        try:
            # closed also when Ctrl-C breaks the loop, so that the server stops as well
            with contextlib.closing(self.client.answer(self.prompt(), answer)) as pieces:
                for piece in pieces:
                    said += piece  # first: what was seen is what is remembered
                    print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            print()
            _note("stopped")
            return said
        except ChatError:
            if said:
                print()
            raise
        print()
        if told := str(answer):
            _note(told)
        return said


def printable(text: str) -> str:
    """Leave out what would steer the terminal; a model may write anything."""
    return "".join(c for c in text if c in "\n\t" or not ("\x7f" <= c <= "\x9f" or c < " "))


def _is_unicode(text: str) -> bool:
    """Whether the terminal sent what Python could decode."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    try:
        options = parse_one(sys.argv[1:] if arguments is None else arguments, PROGRAM, ChatOptions)
    except CommandLineError as error:
        _fail(str(error), status=2)
    try:
        client = Client(options)
        with contextlib.closing(client):
            client.connect()
            if sys.stdin.isatty():
                _converse(Conversation(client, options.system))
            else:
                _answer_input(client, options.system)
    except (ChatError, OSError, ValueError) as error:
        _fail(str(error), status=1)
    except KeyboardInterrupt:
        print()
        sys.exit(130)


def _converse(conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):  # not on Windows; lines are then edited by the console
        import readline  # noqa: F401 - input() has history and wide characters once it is loaded
    client = conversation.client
    _note(f"{client.model} at {client.options.url}; /help lists the commands")
    while True:
        try:
            line = _read_message()
        except KeyboardInterrupt:
            print()
            _note("Ctrl-D or /quit leaves")
            continue
        except EOFError:
            print()
            return
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/help":
                _note(_HELP)
            case "/clear":
                conversation.clear()
            case "/retry":
                conversation.retry()
            case "/system":
                conversation.set_system(rest.strip())
            case _ if command.startswith("/") and command[1:].isalpha():
                _note(f"there is no {command}; /help lists the commands")
            case _:
                conversation.say(line)


def _read_message() -> str:
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("  "))
    return "\n".join(lines)


def _answer_input(client: Client, system: str) -> None:
    """Send what is piped in, and print the answer alone."""
    try:
        text = sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError as error:
        raise ChatError(f"the input is not UTF-8: {error}") from None
    if not text:
        raise ChatError("the input is empty; pipe a message in, or run in a terminal to chat")
    messages = [{"role": "system", "content": system}] if system else []
    answer = Answer()
    for piece in client.answer([*messages, {"role": "user", "content": text}], answer):
        print(piece, end="", flush=True)
    print()
    if answer.finish_reason == "length":
        sys.stderr.write(f"{PROGRAM}: the answer was cut off by its length limit\n")


def _check(response: httpx2.Response) -> None:
    if not response.is_error:
        return
    try:
        message = _message_of(response.json())
    except (ValueError, LookupError, TypeError, AttributeError):
        message = response.text[:200]
    raise ChatError(f"the server answers {response.status_code}: {message}")


def _message_of(body: dict[str, Any]) -> str:
    error = body["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def _api_key(path: Path | None) -> str:
    if path is None:
        return os.environ.get(KEY_VARIABLE, "")
    if not path.is_file():
        raise ChatError(f"--api_key_file {path} does not exist")
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    return next((line for line in lines if line and not line.startswith("#")), "")


def _note(text: str) -> None:
    """Say something that is not the model's."""
    text = printable(text)
    print(f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text, flush=True)


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}: {' '.join(printable(message).split())}\n")
    sys.exit(status)
