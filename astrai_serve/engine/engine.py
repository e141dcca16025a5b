"""The engine and its thread, for callers on other threads and event loops.

The thread owns all state. Commands come in by a queue, on which the thread sleeps when there is
nothing to do; events go out into one bounded `TaskStream` per task. Whatever happens, every stream
ends with exactly one terminal event.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue

import torch

from astrai_core.generation import Completion, FinishReason, GenerationEngine, SamplingParams
from astrai_core.model import Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.engine.chores import Chores
from astrai_serve.engine.config import EngineConfig
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.llm import CompletionParts, each_params
from astrai_serve.engine.statistics import Statistics
from astrai_serve.engine.stream import TaskStream
from astrai_serve.engine.task import EngineClosedError, QueueFullError, Task, TaskEvent
from astrai_serve.engine.tuning import is_native, use_threads

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
"""After so long without work, what has waited for such a time is done."""


class InferenceEngine(GenerationEngine):
    """Generates for many callers at once.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer; None makes an engine without text.
        config: sizes and limits.
        core: what to run instead of the model; tests pass one with a fake executor.
    """

    def __init__(
        self,
        model: Transformer | None,
        tokenizer: AutoTokenizer | None,
        config: EngineConfig | None = None,
        *,
        core: EngineCore | None = None,
    ):
        self.config = config or EngineConfig()
        self.tokenizer = tokenizer
        if core is None:
            assert model is not None, "an engine needs a model or a core"
            core = EngineCore.of_model(model, tokenizer, self.config)
        self._core = core
        self._is_native = model is not None and is_native(model)
        self._threads = self.config.num_threads or torch.get_num_threads()
        self._chores = Chores()  # the thread's own
        self._chores.add(core.idle_work(), is_small=False)
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()  # guards the next three, and the order of task ids
        self._open: dict[int, tuple[Task, TaskStream]] = {}
        self._calls: set[Future[None]] = set()  # whose callers wait
        self._refusal: str | None = None  # set once: why nothing is taken any more
        self._num_tasks = 0
        self._stopping = False
        self._step_started: float | None = None
        self._thread = threading.Thread(target=self._run, name="astrai-engine", daemon=True)
        self._ended = threading.Event()
        self._thread.start()
        threading.Thread(target=self._watch, name="astrai-watchdog", daemon=True).start()

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._core.max_context

    @property
    def why_pages(self) -> str:
        """Why the KV cache has so many pages, in words."""
        return self._core.why_pages

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._core.vocab_size

    @property
    def max_tasks(self) -> int:
        """Most tasks that run and wait."""
        return self.config.max_running_tasks + self.config.max_queued_tasks

    @property
    def num_open(self) -> int:
        """Tasks that run and wait, those included that are on their way in or out."""
        return len(self._open)

    @property
    def is_open(self) -> bool:
        """Whether tasks are taken: the engine was neither closed nor has it failed."""
        return self._refusal is None

    @property
    def healthy(self) -> bool:
        """Whether tasks are taken and steps come to an end."""
        return (
            self._refusal is None
            and self._thread.is_alive()
            and self.step_age < self.config.stall_seconds
        )

    @property
    def step_age(self) -> float:
        """Seconds since the running step began; 0 between steps."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        sample_index: int = 0,
        client: str = "",
        is_bulk: bool = False,
        tells_progress: bool = False,
    ) -> TaskStream:
        """Start a task; any thread may.

        Args:
            prompt_ids: at least one token.
            params: how to sample.
            cache_salt: tasks share cached prefixes only with tasks of the same salt.
            sample_index: which of several samples of one request, for other draws of one seed.
            client: whose task it is; clients get their turns fairly.
            is_bulk: nobody waits for it in front of a screen: chat turns may pass it.
            tells_progress: events tell how far the prompt has come.

        Raises:
            RefusedError: the task can never run.
            QueueFullError: too many tasks are waiting.
            EngineClosedError: the engine was closed or has failed.
        """
        return self._submit(
            prompt_ids,
            params,
            is_limited=True,
            cache_salt=cache_salt,
            sample_index=sample_index,
            client=client,
            is_bulk=is_bulk,
            tells_progress=tells_progress,
        )

    def prepare(self, params: SamplingParams) -> None:
        """Compile a structure ahead of `submit`, which then need not wait; any thread may.

        Raises:
            RefusedError: the structure is wrong, cannot be satisfied, or is too much work.
        """
        self._core.matcher_of(params)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        between_steps: Callable[[], None] | None = None,
    ) -> list[Completion]:
        """Complete each prompt, and wait for all; the queue's limit does not count here.

        Args:
            prompts: token ids.
            params: one set of parameters for all, or one each.
            between_steps: called at each news of a task; what it raises ends the call.

        Raises:
            RefusedError: a prompt can never run.
            GenerationFailedError: an error ended one of the tasks.
        """
        with self._submitted(prompts, each_params(params, len(prompts))) as streams:
            completions: list[Completion] = []
            for stream in streams:
                parts = CompletionParts()
                for event in stream:
                    if between_steps is not None:
                        between_steps()
                    parts.add(event)
                completions.append(parts.completion())
            return completions

    async def generate_async(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """Complete each prompt as `generate` does, without holding up the event loop.

        A caller that is cancelled takes its tasks along.

        Raises:
            RefusedError: a prompt can never run.
            GenerationFailedError: an error ended one of the tasks.
        """
        each = each_params(params, len(prompts))
        for one in each:
            if one.structure is not None:  # what is compiled here is not compiled below
                await asyncio.to_thread(self.prepare, one)
        with self._submitted(prompts, each) as streams:
            completions: list[Completion] = []
            for stream in streams:
                parts = CompletionParts()
                async for event in stream:
                    parts.add(event)
                completions.append(parts.completion())
            return completions

    def update_weights(self) -> None:
        """Forget all cached keys and values; running tasks go on under the new weights.

        Raises:
            EngineClosedError: the engine was closed or has failed.
        """
        done: Future[None] = Future()

        def drop() -> None:
            self._core.drop_computed()
            with self._lock:
                if done in self._calls:  # else the engine was closed meanwhile
                    self._calls.remove(done)
                    done.set_result(None)

        with self._lock:
            if self._refusal is not None:
                raise EngineClosedError(self._refusal)
            self._calls.add(done)
            self._commands.put(drop)
        done.result()

    def when_idle(self, work: Iterator[None]) -> None:
        """Have work done by the engine's thread once there have been no tasks for a while.

        A task that comes waits for the piece under way. Work that fails is told to the log and
        dropped, for the engine can do without.
        """
        self._commands.put(lambda: self._chores.add(work, is_small=False))

    def beside_steps(self, work: Iterator[None]) -> None:
        """The same of work in pieces of milliseconds, which is not kept waiting by tasks."""
        self._commands.put(lambda: self._chores.add(work, is_small=True))

    def use_threads(self, threads: int) -> None:
        """Compute the steps to come on so many threads; for work that is done while idle."""
        assert threading.current_thread() is self._thread, "only between steps"
        self._threads = threads

    def stats(self) -> dict[str, int | float]:
        """Counts since the start, and how things stand; any thread may ask."""
        return {**self._core.stats(), "num_open": len(self._open), "step_age": self.step_age}

    @property
    def statistics(self) -> Statistics:
        """Durations, lengths and speeds since the start; any thread may read them."""
        return self._core.statistics

    def restart_statistics(self) -> None:
        """Forget what was measured so far; to be called while nothing runs."""
        self._core.statistics = Statistics()

    def seconds_of_work(self) -> float | None:
        """Return how long the tasks there are will take; None before speeds are known."""
        with self._lock:
            tasks = [task for task, _ in self._open.values()]
        return self.statistics.seconds_of(tasks)

    def close(self, timeout: float = 10.0) -> None:
        """End every stream at once, stop the thread after its step and free the KV cache.

        Args:
            timeout: seconds to wait for the step that is running.
        """
        self._refuse_and_end("the engine was closed", FinishReason.CANCELLED)
        self._commands.put(self._stop)
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning("the engine's last step is still running after %g s", timeout)

    @contextlib.contextmanager
    def _submitted(
        self, prompts: Sequence[Sequence[int]], each: Sequence[SamplingParams]
    ) -> Iterator[list[TaskStream]]:
        """Tasks for the prompts, all of which end with the block, whatever ends it."""
        streams: list[TaskStream] = []
        try:
            for prompt_ids, params in zip(prompts, each, strict=True):
                streams.append(self._submit(prompt_ids, params, is_limited=False))
            yield streams
        finally:
            for stream in streams:
                stream.cancel()

    def _submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        is_limited: bool,
        cache_salt: str = "",
        sample_index: int = 0,
        client: str = "",
        is_bulk: bool = False,
        tells_progress: bool = False,
    ) -> TaskStream:
        most = self.max_tasks
        matcher = self._core.matcher_of(params)  # without the lock: it may take seconds
        with self._lock:
            if self._refusal is not None:
                raise EngineClosedError(self._refusal)
            if is_limited and len(self._open) >= most:
                raise QueueFullError(
                    f"{self.config.max_queued_tasks} tasks are waiting already; try again later"
                )
            task_id = self._num_tasks
            task = self._core.new_task(
                task_id,
                prompt_ids,
                params,
                cache_salt=cache_salt,
                sample_index=sample_index,
                client=client,
                is_bulk=is_bulk,
                tells_progress=tells_progress,
                matcher=matcher,
            )
            self._num_tasks += 1
            stream = TaskStream(task_id, len(prompt_ids), lambda: self._cancel(task_id))
            self._open[task_id] = (task, stream)
            self._commands.put(lambda: self._core.add(task))
        return stream

    def _cancel(self, task_id: int) -> None:
        self._commands.put(lambda: self._deliver(self._core.cancel(task_id)))

    def _stop(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        try:
            use_threads(self._threads, self._is_native)
            while not self._stopping:
                self._obey()
                if self._core.has_tasks and not self._stopping:
                    self._step_started = time.monotonic()
                    self._deliver(self._core.step())
                    self._step_started = None
                    self._chores.between_steps()
                    if not self._core.has_tasks:
                        self._core.check_idle()
        except BaseException as error:
            logger.exception("the engine failed")
            self._refuse_and_end(f"the engine failed ({error!r})", FinishReason.ERROR)
        finally:
            self._ended.set()
            self._core.close()

    def _watch(self) -> None:
        """Tell the log of a step that hangs, once, and of its end."""
        hanging: float | None = None  # when the step that was told of began
        while not self._ended.wait(min(self.config.stall_seconds / 4, 5.0)):
            started = self._step_started
            if hanging is not None and started != hanging:
                logger.warning("the step that hung has ended; the engine goes on")
                hanging = None
            if started is not None and hanging is None and not self.healthy:
                logger.error(
                    "a step has been running for more than %g s: the engine hangs, and its health "
                    "is bad until the step ends",
                    self.config.stall_seconds,
                )
                hanging = started

    def _obey(self) -> None:
        """Carry out all commands; sleep until there is one if there is nothing else to do."""
        if not self._core.has_tasks:
            self._next_command()()
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            command()

    def _next_command(self) -> Callable[[], None]:
        """Wait for a command; while none comes, do what has waited for that, piece by piece."""
        is_idle = False
        try:
            while self._chores:
                waits = not is_idle and not self._chores.has_small
                try:
                    return self._commands.get(timeout=IDLE_SECONDS if waits else 0)
                except Empty:
                    is_idle = is_idle or waits
                self._chores.while_idle()
        finally:
            if is_idle:
                use_threads(self._threads, self._is_native)
        return self._commands.get()

    def _deliver(self, events: list[tuple[int, TaskEvent]]) -> None:
        with self._lock:
            for task_id, event in events:
                if task_id not in self._open:
                    continue  # the engine is closed, and the stream was ended by that
                self._open[task_id][1].put(event)
                if event.finish is not None:
                    del self._open[task_id]

    def _refuse_and_end(self, why: str, reason: FinishReason) -> None:
        """Take no more tasks, and end those there are."""
        with self._lock:
            self._refusal = self._refusal or why
            for task, stream in self._open.values():
                stream.put(TaskEvent(finish=task.finish(reason, message=why)))
            self._open.clear()
            for call in self._calls:
                call.set_exception(EngineClosedError(why))
            self._calls.clear()
