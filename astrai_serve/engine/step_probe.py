"""A few steps of a model, timed on several counts of threads."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch

from astrai_core.generation import SamplingParams
from astrai_core.model import Transformer
from astrai_serve.engine.config import EngineConfig
from astrai_serve.engine.executor import Executor
from astrai_serve.engine.kv_storage import KVStorage
from astrai_serve.engine.scheduler import Chunk
from astrai_serve.engine.task import Task

ENOUGH_SECONDS = 1.2
"""After three rounds, no other one begins when so much time is over."""
LIMIT_SECONDS = 6.0
"""No step begins when so much time is over, whatever is known by then."""
SLOW_SECONDS = 0.5
"""A model whose first token takes longer on all cores is not tried on fewer."""
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 15
_TOKENS = 128  # of a context that is there, and of a prompt
_NUM_TASKS = 8


class Speeds(NamedTuple):
    """Tokens a second of each kind of step."""

    alone: float
    """Of one task's answer."""
    several: float
    """Of the answers of several tasks, together."""
    prompt: float

    def __str__(self) -> str:
        return (
            f"{self.prompt:,.0f} prompt tokens/s, {self.alone:,.0f} tokens/s of an answer alone, "
            f"{self.several:,.0f} of several at once"
        )


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """Seconds that have passed, and seconds that the calling thread had a core."""

    wall: Callable[[], float] = time.perf_counter
    thread: Callable[[], float] = time.thread_time


@dataclass(kw_only=True)
class Samples:
    """Seconds of steps."""

    times: dict[int, list[list[float]]] = field(default_factory=dict[int, list[list[float]]])
    """For each count of threads and each kind of step, one for each whole round."""
    shares: list[float] = field(default_factory=list[float])
    """For what part of each step on one thread that thread had a core."""
    seconds: float = 0.0
    """Of all steps together, without what was done between them."""


class Steps(Protocol):
    """Kinds of steps that can be run; `StepProbe`, or a fake in tests."""

    KINDS: ClassVar[tuple[str, ...]]

    def run(self, kind: str) -> None:
        """Compute one step."""
        ...


class StepProbe:
    """Steps of a model over a cache of their own, as small as can be.

    Args:
        model: as it will run, in evaluation mode.
        config: the engine's settings.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("alone", "several", "prompt")

    def __init__(self, model: Transformer, config: EngineConfig):
        self._model = model
        self._config = config
        self._executor: Executor | None = None
        room = config.context_within(model.config.max_len)
        self._context = min(_TOKENS, room - 1)
        self._chunk = min(_TOKENS, room, config.max_step_tokens)
        self._num_tasks = min(_NUM_TASKS, config.max_running_tasks)

    def speeds(self, times: Mapping[int, Sequence[float]]) -> dict[int, Speeds]:
        """Tokens/s of each kind of step, from its seconds."""
        return {
            threads: Speeds(1 / alone, self._num_tasks / several, self._chunk / prompt)
            for threads, (alone, several, prompt) in times.items()
        }

    def run(self, kind: str) -> None:
        """Compute one step; one that goes wrong is for the warm-up to tell."""
        if self._executor is None:
            self._executor = self._make_executor()
        size = self._config.page_size
        if kind == "prompt":
            tasks, start, length = 1, 0, self._chunk
        else:
            tasks, start, length = (1 if kind == "alone" else self._num_tasks), self._context, 1
        num_pages = self._pages_each
        chunks = [
            Chunk(
                _task(n, start + length, self._model.config.vocab_size),
                start,
                length,
                list(range(n * num_pages, n * num_pages + -(-(start + length) // size))),
                True,
            )
            for n in range(tasks)
        ]
        self._executor.execute(chunks)

    @property
    def _pages_each(self) -> int:
        return -(-max(self._context + 1, self._chunk) // self._config.page_size)

    def _make_executor(self) -> Executor:
        model, config = self._model, self._config
        named = config.kv_dtype
        dtype = model.dtype if named == "auto" else getattr(torch, named)
        num_pages = self._num_tasks * self._pages_each
        storage = KVStorage(model.config, num_pages, config.page_size, dtype, model.device)
        return Executor(model, storage)


def measuring(
    steps: Steps,
    counts: Sequence[int],
    use_threads: Callable[[int], None],
    samples: Samples,
    clocks: Clocks | None = None,
) -> Iterator[None]:
    """Time each kind of step on each count of threads, round after round; a step for each `next`.

    A round tries all counts, so that whoever disturbs it disturbs all. The first round is not
    counted where others follow: it pays for what is allocated and started. Between two steps other
    work may be done, on any count of threads: the count is set anew before each step.

    Args:
        steps: what is timed.
        counts: of threads.
        use_threads: sets how many compute.
        samples: takes the times, those of whole rounds.
        clocks: what times the steps; tests pass their own.
    """
    clocks = clocks or Clocks()
    use_threads(max(counts))
    steps.run(steps.KINDS[0])  # pays for what is compiled, which says nothing of later steps
    yield
    rounds: list[dict[int, list[float]]] = []
    while len(rounds) <= _MOST_ROUNDS:
        if len(rounds) > _LEAST_ROUNDS and samples.seconds > ENOUGH_SECONDS:
            break
        shares: list[float] = []
        one: dict[int, list[float]] = {}
        yield from _round(steps, counts, use_threads, clocks, samples, one, shares)
        if len(one) < len(counts) or any(len(row) < len(steps.KINDS) for row in one.values()):
            break
        if len(rounds) == 1:  # the first one was for warming up
            samples.shares.clear()
        rounds.append(one)
        samples.shares += shares
    for one in rounds[1:] or rounds:
        for threads, row in one.items():
            columns = samples.times.setdefault(threads, [[] for _ in row])
            for column, seconds in zip(columns, row, strict=True):
                column.append(seconds)


def _round(
    steps: Steps,
    counts: Sequence[int],
    use_threads: Callable[[int], None],
    clocks: Clocks,
    samples: Samples,
    times: dict[int, list[float]],
    shares: list[float],
) -> Iterator[None]:
    """Add the seconds of each kind of step by count of threads, until time is over."""
    for threads in sorted(counts, reverse=True):
        # the first one is not counted: the threads of a new count are started in it
        for place, kind in enumerate((steps.KINDS[0], *steps.KINDS)):
            if samples.seconds > LIMIT_SECONDS:
                return
            use_threads(threads)
            wall, own = clocks.wall(), clocks.thread()
            steps.run(kind)
            seconds = clocks.wall() - wall
            samples.seconds += seconds
            if place == 0:
                if seconds > SLOW_SECONDS:
                    return
            else:
                times.setdefault(threads, []).append(seconds)
                if threads == 1:
                    shares.append((clocks.thread() - own) / seconds if seconds > 0 else 1.0)
            yield


def _task(task_id: int, num_tokens: int, vocab_size: int) -> Task:
    prompt = tuple((task_id + place) % vocab_size for place in range(num_tokens))
    params = SamplingParams(temperature=0, max_tokens=1)
    return Task(task_id=task_id, prompt_ids=prompt, params=params, max_tokens=1, seed=0)
