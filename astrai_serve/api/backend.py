"""What HTTP asks of an engine, and nothing more: `InferenceEngine`, or a small object in a test."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from astrai_core.generation import SamplingParams
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.engine import TaskStream
from astrai_serve.engine.statistics import Statistics


class Engine(Protocol):
    """Token ids in, one stream of events per task out."""

    @property
    def tokenizer(self) -> AutoTokenizer | None:
        """The tokenizer of the model."""
        ...

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def max_tasks(self) -> int:
        """Most tasks that run and wait."""
        ...

    @property
    def num_open(self) -> int:
        """Tasks that run and wait."""
        ...

    @property
    def statistics(self) -> Statistics:
        """Durations, lengths and speeds since the start."""
        ...

    def stats(self) -> Mapping[str, int | float]:
        """Counts since the start, and how things stand."""
        ...

    def seconds_of_work(self) -> float | None:
        """How long the tasks there are will take; None before speeds are known."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether tasks are taken and steps come to an end."""
        ...

    def prepare(self, params: SamplingParams) -> None:
        """Do what would keep `submit` waiting; raises `RefusedError`."""
        ...

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
        """Start a task; raises `EngineError` when it is not taken."""
        ...

    def close(self, timeout: float = ...) -> None:
        """End every task, and wait so many seconds for the step that is running."""
        ...
