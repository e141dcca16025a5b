"""The way out of the engine: one bounded queue of events per task, for one reader.

The engine never waits for a reader. When the queue is full, news is merged into its last event,
so a slow reader gets fewer and larger events and loses nothing.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from astrai_serve.engine.task import TaskEvent

MAX_EVENTS = 64


class TaskStream:
    """Events of one task; iterate it, or iterate it asynchronously.

    Iteration ends after the event that carries `finish`. As a context manager it cancels the task
    when the block is left, which does nothing to a task that has ended.

    Args:
        task_id: the task's id.
        num_prompt_tokens: length of its prompt.
        on_cancel: called when the reader cancels, in the reader's thread.
    """

    def __init__(self, task_id: int, num_prompt_tokens: int, on_cancel: Callable[[], None]):
        self.task_id = task_id
        self.num_prompt_tokens = num_prompt_tokens
        self._on_cancel = on_cancel
        self._events: deque[TaskEvent] = deque()
        self._news = threading.Condition(threading.Lock())
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._closed = False  # the terminal event was put

    def put(self, event: TaskEvent) -> None:
        """Add an event, from the engine's thread; never blocks for the reader."""
        with self._news:
            assert not self._closed, f"task {self.task_id} got an event after its last one"
            self._closed = event.finish is not None
            if len(self._events) < MAX_EVENTS:
                self._events.append(event)
            else:
                self._events[-1] += event
            waiter, self._waiter = self._waiter, None
            self._news.notify()
        if waiter is not None:
            loop, future = waiter
            try:
                loop.call_soon_threadsafe(_wake, future)
            except RuntimeError:  # the reader's loop is closed: nobody will read on
                self.cancel()

    def cancel(self) -> None:
        """Ask the engine to end the task; its terminal event still arrives. Idempotent."""
        if not self._closed:
            self._on_cancel()

    def __iter__(self) -> "TaskStream":
        return self

    def __next__(self) -> TaskEvent:
        with self._news:
            while not self._events:
                if self._closed:
                    raise StopIteration
                self._news.wait()
            return self._events.popleft()

    def __aiter__(self) -> "TaskStream":
        return self

    async def __anext__(self) -> TaskEvent:
        while True:
            with self._news:
                if self._events:
                    return self._events.popleft()
                if self._closed:
                    raise StopAsyncIteration
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiter = (loop, future)
            # a reader that is cancelled here has taken nothing, so no event is lost
            await future

    def __enter__(self) -> "TaskStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> "TaskStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
