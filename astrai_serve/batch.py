"""`astrai-batch`: a file of requests becomes a file of answers, in OpenAI's batch format.

An answer is written as soon as it is there, in one piece. So a run may end at any moment: the next
one takes a half-written last line away, reads which requests are answered and does the others.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NoReturn

from astrai_core.command_line import CommandLineError, needs_extra, parse, told
from astrai_serve.cli import ServeOptions, check_files, load_tokenizer
from astrai_serve.engine.config import EngineConfig
from astrai_serve.generation_defaults import GenerationDefaults

if TYPE_CHECKING:
    from astrai_serve.api import ServerSettings
    from astrai_serve.api.generation_request import Generation
    from astrai_serve.api.openai import OpenAIHandler
    from astrai_serve.engine import InferenceEngine

logger = logging.getLogger(__name__)

PROGRAM = "astrai-batch"
MAX_LINE_BYTES = 8 * 2**20
_AGAIN = "run the same command again to go on"


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Answer a JSONL file of requests, without a server.

    A line is {"custom_id", "method": "POST", "url", "body"}, with /v1/chat/completions or
    /v1/completions as its url. Answers come in the order in which they are ready. The same command
    again goes on where a run ended.
    """

    model: Path
    """Model folder, or a LoRA checkpoint, which names its base."""
    input: Path
    """JSONL file of requests."""
    output: Path
    """JSONL file of answers; those that are there already are kept and not computed again."""
    adapter: Path | None = None
    """Folder of a LoRA adapter, ours or PEFT's, to merge into the model."""
    model_name: str = ""
    """What requests call the model; empty is the folder's name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto is the folder's own where this CPU computes in it."""
    weights: Literal["auto", "fp32", "bf16", "w8a8", "int8", "int4"] = "auto"
    """What the weights are rounded to as they are read; auto takes them as they are."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, if not the model's."""

    def __post_init__(self) -> None:
        if self.input.resolve() == self.output.resolve():
            raise ValueError(f"--input and --output are the same file, {self.input}")

    @property
    def served(self) -> ServeOptions:
        """The model as `astrai-serve` would be told of it."""
        names = ("model", "adapter", "model_name", "dtype", "weights", "tokenizer")
        return ServeOptions(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the input that has no answer yet."""

    number: int
    custom_id: str | None = None
    url: str = ""
    body: Mapping[str, object] = field(default_factory=dict[str, object])
    error: str | None = None
    """What is wrong with the line itself."""


class Answers:
    """The output file: what it holds already, and a place for more.

    Args:
        path: made if it is not there.

    Raises:
        ValueError: it is not a file of answers.
    """

    def __init__(self, path: Path):
        self.num_failed = 0
        self._known: set[bytes] = set()
        self._file: BinaryIO = path.open("a+b", buffering=0)
        try:
            self._recall(path)
        except BaseException:
            self._file.close()
            raise

    @property
    def count(self) -> int:
        """Answers in the file, from this run and earlier ones."""
        return len(self._known)

    def has(self, line: Line) -> bool:
        """Whether a line was answered."""
        return _key(line.custom_id, line.number) in self._known

    def write(self, line: Line, response: object = None, error: object = None) -> None:
        """Append an answer in one piece."""
        answer = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }
        text = memoryview(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        while text:
            text = text[self._file.write(text) :]
        self._note(answer, line.number)

    def close(self) -> None:
        """Make sure that all is on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _recall(self, path: Path) -> None:
        self._file.seek(0)
        end = 0
        with path.open("rb") as written:
            for number, text in enumerate(written, 1):
                if not text.endswith(b"\n"):
                    break  # a run ended while it wrote this
                end += len(text)
                try:
                    answer = json.loads(text)
                    self._note(answer, (answer["error"] or {}).get("line", 0))
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(
                        f"--output {path} has no answer in line {number}; name another file"
                    ) from None
        self._file.truncate(end)

    def _note(self, answer: Mapping[str, object], number: int) -> None:
        custom_id, response = answer["custom_id"], answer["response"]
        is_answered = isinstance(response, dict) and response["status_code"] == 200
        self.num_failed += not is_answered
        self._known.add(_key(custom_id if isinstance(custom_id, str) else None, number))


def _key(custom_id: str | None, number: int) -> bytes:
    """What a line is known by; a line of which nothing can be told, by its number."""
    told = f"line {number}" if custom_id is None else f"id {custom_id}"
    return blake2b(told.encode(errors="surrogatepass"), digest_size=16).digest()


def read_lines(path: Path, urls: Sequence[str]) -> Iterator[Line]:
    """Read requests one by one; a line that is none says so in its `error`.

    Args:
        path: the input; empty lines are passed over.
        urls: addresses that exist.
    """
    seen: dict[bytes, int] = {}
    with path.open("rb") as file:
        number = 0
        while text := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(text) > MAX_LINE_BYTES:
                while not text.endswith(b"\n") and (text := file.readline(MAX_LINE_BYTES)):
                    pass
                yield Line(number=number, error=f"longer than {MAX_LINE_BYTES} bytes")
                continue
            if not text.strip():
                continue
            line = _parse(text, number, urls)
            if line.custom_id is not None:
                first = seen.setdefault(_key(line.custom_id, number), number)
                if first != number:
                    told = f"custom_id {line.custom_id[:60]!r} is that of line {first}, too"
                    line = Line(number=number, error=told)
            yield line


def _parse(text: bytes, number: int, urls: Sequence[str]) -> Line:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(number=number, error=f"not JSON: {error}")
    if not isinstance(data, dict):
        return Line(number=number, error="not a JSON object")
    custom_id, method, url, body = (data.get(k) for k in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        return Line(number=number, error="custom_id must be a string that is not empty")
    wrong = None
    if method != "POST":
        wrong = f"method must be POST, not {method!r:.60}"
    elif url not in urls:
        wrong = f"url must be {' or '.join(urls)}, not {url!r:.60}"
    elif not isinstance(body, dict):
        wrong = f"body must be a JSON object, not {body!r:.60}"
    elif body.get("stream"):
        wrong = "body.stream must be false: a batch has no streams"
    if wrong is not None:
        return Line(number=number, custom_id=custom_id, error=wrong)
    return Line(number=number, custom_id=custom_id, url=str(url), body=dict(body or {}))


class Progress:
    """Tells how far a run is: one line that is written over on a terminal, else now and then."""

    def __init__(self, total: int, answers: Answers):
        self.total = total
        self.num_tokens = 0
        self._answers = answers
        self._is_terminal = sys.stderr.isatty()
        self._started = self._told = time.monotonic()

    def tell(self, *, is_last: bool = False) -> None:
        """Write the line if it is time to."""
        now = time.monotonic()
        if not is_last and now - self._told < (0.5 if self._is_terminal else 10):
            return
        self._told = now
        rate = self.num_tokens / max(now - self._started, 1e-9)
        text = (
            f"{PROGRAM}: {self._answers.count} of {self.total} requests, "
            f"{self._answers.num_failed} failed, {rate:,.0f} tokens/s"
        )
        start, end = ("\r", "\n" if is_last else "") if self._is_terminal else ("", "\n")
        sys.stderr.write(start + text + end)
        sys.stderr.flush()


class Batch:
    """A run over one input.

    Args:
        engine: generates.
        handlers: who answers at which url.
        answers: where the answers go.
        progress: is told of each.
    """

    def __init__(
        self,
        engine: "InferenceEngine",
        handlers: "Mapping[str, OpenAIHandler]",
        answers: Answers,
        progress: Progress,
    ):
        self.engine = engine
        self.handlers = handlers
        self.answers = answers
        self.progress = progress

    async def run(self, path: Path) -> None:
        """Answer every line of `path` that is not answered yet.

        Raises:
            RuntimeError: the engine failed; what it had not answered is not in the output.
        """
        # enough that the engine never waits for us, and not all of a long file
        most = 2 * self.engine.config.max_running_tasks
        pending: set[asyncio.Task[None]] = set()
        try:
            for line in read_lines(path, tuple(self.handlers)):
                if self.answers.has(line):
                    continue
                while len(pending) >= most:
                    pending = await self._wait(pending)
                pending.add(asyncio.create_task(self._answer(line)))
            while pending:
                pending = await self._wait(pending)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        self.progress.tell(is_last=True)

    async def _wait(self, pending: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        done, rest = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        self.progress.tell()
        return rest

    async def _answer(self, line: Line) -> None:
        from astrai_serve.api.errors import ApiError, InternalError
        from astrai_serve.api.openai import error_body

        if line.error is not None:
            message = f"line {line.number}: {line.error}"
            error = {"code": "invalid_line", "message": message, "line": line.number}
            self.answers.write(line, error=error)
            return
        request_id = uuid.uuid4().hex
        try:
            status, body = 200, await self._generate(line)
        except ApiError as error:
            status, body = error.status, error_body(error)
        except Exception:  # a line that breaks something of ours must not end the others
            logger.exception("line %d failed", line.number)
            status, body = (
                500,
                error_body(InternalError("the request broke the batch; see its log")),
            )
        if status >= 500 and not self.engine.is_open:
            raise RuntimeError(f"the engine failed at line {line.number}; {_AGAIN}")
        answer = {"status_code": status, "request_id": request_id, "body": body}
        self.answers.write(line, response=answer)

    async def _generate(self, line: Line) -> object:
        handler = self.handlers[line.url]
        context = handler.read(line.body, "")
        context.submitted = time.perf_counter()
        generation = await self._submit(context.request.submit)
        try:
            async for index, event in generation:
                context.add(index, event)
        finally:
            generation.cancel()
        self.progress.num_tokens += context.num_output_tokens
        return handler.format_response(context)

    async def _submit(self, submit: "Callable[[InferenceEngine], Generation]") -> "Generation":
        """Wait for room where others take it; what does not fit into an empty queue never will."""
        from astrai_serve.api.errors import BusyError

        while True:
            is_empty = self.engine.num_open == 0
            try:
                return submit(self.engine)
            except BusyError:
                if is_empty:
                    raise
            await asyncio.sleep(0.02)


def answer(
    engine: "InferenceEngine", settings: "ServerSettings", source: Path, output: Path
) -> tuple[int, int]:
    """Answer the requests of a file.

    Args:
        engine: generates; it must have a tokenizer.
        settings: the model's name and how to sample for requests that do not say.
        source: JSONL of requests.
        output: JSONL of answers, where a run goes on.

    Returns:
        How many answers the output holds, and how many of them are errors.

    Raises:
        ValueError: the output is no file of answers.
        RuntimeError: the engine failed.
    """
    import anyio

    from astrai_serve.api.openai_chat import ChatHandler
    from astrai_serve.api.openai_completions import CompletionHandler
    from astrai_serve.api.shutdown import Shutdown

    assert engine.tokenizer is not None, "requests are text"
    answers = Answers(output)
    with contextlib.closing(answers):
        common = (engine, engine.tokenizer, settings, Shutdown(), anyio.CapacityLimiter(1))
        handlers = {
            "/v1/chat/completions": ChatHandler(*common),
            "/v1/completions": CompletionHandler(*common),
        }
        progress = Progress(_count(source), answers)
        asyncio.run(Batch(engine, handlers, answers, progress).run(source))
    return answers.count, answers.num_failed


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in iter(lambda: file.readline(MAX_LINE_BYTES), b"") if line.strip())


@needs_extra(PROGRAM, "serve")
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    try:
        options, config = parse(
            sys.argv[1:] if arguments is None else arguments, PROGRAM, BatchOptions, EngineConfig
        )
    except CommandLineError as error:
        _fail(str(error), status=2)
    try:
        _run(options, config)
    except KeyboardInterrupt:
        _fail(f"interrupted; {_AGAIN}", status=130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        _fail(told(error), status=1)


def _run(options: BatchOptions, config: EngineConfig) -> None:
    served = options.served
    check_files(served)
    if not options.input.is_file():
        raise ValueError(f"--input {options.input} is not a file")
    if not options.output.parent.is_dir():
        raise ValueError(f"--output {options.output}: there is no folder {options.output.parent}")
    defaults = GenerationDefaults.read(served.text_folder if served.adapter else served.model)
    from astrai_serve.api import ServerSettings
    from astrai_serve.engine import InferenceEngine
    from astrai_serve.model_source import ModelSource, dtype_name

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    source = ModelSource.find(options.model, options.dtype, False, options.adapter, options.weights)
    sys.stderr.write(f"{PROGRAM}: {options.model}: {source.describe()}\n")
    tokenizer = load_tokenizer(served, source)
    engine = InferenceEngine(source.load(), tokenizer, config)
    settings = ServerSettings(
        model_name=served.name, defaults=defaults, dtype=source.scheme or dtype_name(source.dtype)
    )
    try:
        _, failed = answer(engine, settings, options.input, options.output)
        if failed:
            told_in = f"{options.output} says why, under error or response"
            sys.stderr.write(f"{PROGRAM}: {failed} requests failed; {told_in}\n")
    finally:
        engine.close()


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}: {message}\n")
    sys.exit(status)
