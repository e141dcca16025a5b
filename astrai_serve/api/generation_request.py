"""What a client asked for, whatever the protocol, and the tasks that answer it.

n samples of p prompts make n * p tasks; choice i is sample i % n of prompt i // n. Each sample has
its own index in the engine's random numbers, so that one seed gives n different answers.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from astrai_core.generation import SamplingParams
from astrai_serve.api.backend import Engine
from astrai_serve.api.conversation import Reading
from astrai_serve.api.errors import (
    ApiError,
    BusyError,
    ContextLengthError,
    InternalError,
    InvalidRequestError,
)
from astrai_serve.api.retry import retry_seconds
from astrai_serve.engine import (
    EngineClosedError,
    QueueFullError,
    RefusedError,
    TaskEvent,
    TaskStream,
)

_FORMS = ("json_schema", "regex", "choice", "grammar")  # as the engine calls them
_WAITING_EVENTS = 16  # beyond these a slow reader's events are merged in the TaskStream


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """n answers to each prompt."""

    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    n: int = 1
    stream: bool = False
    cache_salt: str = ""
    """Prefixes are shared only among requests of the same salt."""
    client: str = ""
    """Whose request it is; clients get their turns fairly."""
    is_bulk: bool = False
    """Nobody waits for it in front of a screen: chat turns may pass it."""

    priority: int = 0
    """Below 0 it is chat and above 0 bulk, whatever its address."""
    reading: Reading | None = None
    """How answers are taken apart; None leaves them text."""
    default_max_tokens: int | None = None
    """Most new tokens where `params` set no limit; it gives way to the room, and is no request."""
    tells_progress: bool = False
    """A stream tells how far the prompts have come."""
    includes_stop: bool = False
    """The stop string that ended an answer is part of it."""
    structure_param: str | None = None
    """The parameter to name when the form cannot be had."""
    echo: bool = False
    """Give the prompt back before the answer."""
    tells_token_ids: bool = False
    """Tell the ids of prompt and answer beside the text."""
    tells_prompt: bool = False
    """Tell the log-probabilities of the prompt in a list of their own."""

    def prompt_of(self, choice: int) -> tuple[int, ...]:
        """The prompt that a choice answers."""
        return self.prompts[choice // self.n]

    @property
    def num_choices(self) -> int:
        """Answers in all."""
        return self.n * len(self.prompts)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts; those of a prompt with several answers count once."""
        return sum(map(len, self.prompts))

    def prepare(self, engine: Engine) -> None:
        """Do the slow part of `submit`; any thread may.

        Raises:
            ApiError: the engine will never take the tasks.
        """
        if self.num_choices > engine.max_tasks:
            raise InvalidRequestError(
                f"n asks for {self.num_choices} answers in all, and this server holds "
                f"{engine.max_tasks} at a time; ask for fewer",
                param="n",
            )
        try:
            engine.prepare(self.params)
        except RefusedError as error:
            raise self._refusal(error, engine) from error

    def submit(self, engine: Engine) -> "Generation":
        """Hand the tasks to the engine: all of them or none.

        Raises:
            ApiError: the engine does not take them.
        """
        streams: list[TaskStream] = []
        try:
            for choice in range(self.num_choices):
                prompt = self.prompt_of(choice)
                stream = engine.submit(
                    prompt,
                    self._params_for(prompt, engine),
                    cache_salt=self.cache_salt,
                    sample_index=choice % self.n,
                    client=self.client,
                    is_bulk=self.is_bulk,
                    tells_progress=self.tells_progress,
                )
                streams.append(stream)
        except (RefusedError, QueueFullError, EngineClosedError) as error:
            raise self._refusal(error, engine) from error
        else:
            return Generation(streams, self.includes_stop)
        finally:
            if len(streams) < self.num_choices:
                for stream in streams:
                    stream.cancel()

    def _params_for(self, prompt: Sequence[int], engine: Engine) -> SamplingParams:
        """With the default limit, where it is nearer than the end of the context."""
        if self.params.max_tokens is not None or self.default_max_tokens is None:
            return self.params
        limit = max(self.default_max_tokens, self.params.min_tokens)
        if limit >= engine.max_context - len(prompt):
            return self.params
        return replace(self.params, max_tokens=limit)

    def _refusal(
        self, error: RefusedError | QueueFullError | EngineClosedError, engine: Engine
    ) -> ApiError:
        match error:
            case RefusedError():
                param = str(error).partition(" ")[0]
                if param in _FORMS and self.structure_param is not None:
                    return InvalidRequestError(
                        f"{self.structure_param}: {error}", param=self.structure_param
                    )
                longest = max(map(len, self.prompts)) + (self.params.max_tokens or 1)
                if longest > engine.max_context:
                    return ContextLengthError(str(error))
                return InvalidRequestError(str(error), param=param)
            case QueueFullError():
                return BusyError(str(error), retry_after=retry_seconds(engine))
            case EngineClosedError():
                return InternalError(str(error), code="engine_closed")


class Generation:
    """The events of all tasks of a request, in the order they come; iterate it once.

    Lives on the event loop. `cancel` ends the tasks wherever they stand and is always called.
    """

    def __init__(self, streams: Sequence[TaskStream], includes_stop: bool = False):
        self._streams = streams
        self._includes_stop = includes_stop
        self._num_open = len(streams)
        self._news: asyncio.Queue[tuple[int, TaskEvent] | Exception] = asyncio.Queue(
            _WAITING_EVENTS
        )
        self._pumps = [
            asyncio.create_task(self._pump(choice, stream)) for choice, stream in enumerate(streams)
        ]

    async def _pump(self, choice: int, stream: TaskStream) -> None:
        try:
            async for event in stream:
                await self._news.put((choice, event))
        except Exception as error:
            # the reader waits for this queue and not for the task: it raises the error
            await self._news.put(error)

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> tuple[int, TaskEvent]:
        """Return the next event and the choice it belongs to.

        Raises:
            ApiError: the generation was interrupted.
        """
        if self._num_open == 0:
            raise StopAsyncIteration
        news = await self._news.get()
        if isinstance(news, Exception):
            raise news
        choice, event = news
        if event.finish is not None:
            self._num_open -= 1
            if self._includes_stop and event.finish.stop is not None:
                event = replace(event, text=event.text + event.finish.stop)
        return choice, event

    @property
    def is_over(self) -> bool:
        """Whether the reader has heard of the end of every task."""
        return self._num_open == 0

    def interrupt(self, error: ApiError) -> None:
        """Cancel, and let the reader hear of it now and not when the engine has come round."""
        self.cancel()
        while not self._news.empty():
            self._news.get_nowait()
        self._news.put_nowait(error)

    def cancel(self) -> None:
        """End all tasks and free what they hold; does nothing to those that have ended."""
        for stream in self._streams:
            stream.cancel()
        for pump in self._pumps:
            pump.cancel()
