"""One token stream that the scheduler runs, what it tells its reader, and why it may be refused.

A client's request for n samples makes n tasks. `num_computed_tokens` counts the positions whose
keys and values are in the cache; it catches up with `num_tokens`, and the last token of a task is
never computed before the next one is wanted.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from astrai_core.generation import FinishReason, SamplingParams


class EngineError(Exception):
    """Why the engine has no answer.

    EngineError
    ├── RefusedError           the task can never run; also a ValueError
    ├── QueueFullError         too many tasks are waiting; try again later
    ├── EngineClosedError      the engine was closed or has failed
    └── GenerationFailedError  an error ended a task of a blocking call
    """


class RefusedError(EngineError, ValueError):
    """The task can never run here: it does not fit, or asks for what the model lacks."""


class QueueFullError(EngineError, RuntimeError):
    """Too many tasks are waiting."""


class EngineClosedError(EngineError, RuntimeError):
    """The engine was closed or has failed."""


class GenerationFailedError(EngineError, RuntimeError):
    """An error ended a task of a blocking call; the engine goes on."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log-probability of a chosen token, and of the most likely ones in its place.

    Natural logarithms under the full softmax at temperature 1, before penalties and filters.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What a step chose for a task."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How a task ended."""

    reason: FinishReason
    stop: str | None = None
    """The stop string that was met, if one was."""
    stop_token_id: int | None = None
    """The stop token that was chosen, if one was; it is the last token and has no text."""
    message: str | None = None
    """What went wrong, for an error."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens found in the prefix cache when the task was first admitted."""
    num_output_tokens: int


@dataclass(frozen=True, kw_only=True)
class TaskEvent:
    """News of a task: text that no later token can change, and the tokens since the last event.

    Text may lag behind the tokens: half a character and what may become a stop string are held
    back. The last event of a task, and no other, carries `finish`.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    text_ends: tuple[int, ...] = ()
    """For each of `token_ids`, how many characters of `text` were there when it had come."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids` if the task asked for them, else empty."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens but the first, with the first token, if the task asked for them."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache; told with the first token, and with progress."""
    num_computed_tokens: int | None = None
    """Prompt tokens whose keys and values are there, those found in the cache included: told after
    each step in which the prompt got on, if the task asked for its progress."""
    finish: Finish | None = None

    def __add__(self, later: "TaskEvent") -> "TaskEvent":
        """Both as one event."""
        assert self.finish is None, "nothing follows the terminal event"
        return TaskEvent(
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            text_ends=self.text_ends + tuple(len(self.text) + end for end in later.text_ends),
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=self.prompt_logprobs + later.prompt_logprobs,
            num_cached_tokens=(
                later.num_cached_tokens
                if self.num_cached_tokens is None
                else self.num_cached_tokens
            ),
            num_computed_tokens=(
                self.num_computed_tokens
                if later.num_computed_tokens is None
                else later.num_computed_tokens
            ),
            finish=later.finish,
        )


class TokenMatcher(Protocol):
    """Says which tokens may come next; `structured.Matcher`."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a completion whose form is complete."""
        ...

    @property
    def is_complete(self) -> bool:
        """Nothing may follow."""
        ...

    def write_mask(self, bits: NDArray[np.uint32]) -> None:
        """Write a bit for each token: 1 where it may come next."""
        ...

    def advance(self, token_id: int) -> None:
        """Take note of the chosen token."""
        ...


class TaskStatus(StrEnum):
    """Where a task stands."""

    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(eq=False, slots=True, kw_only=True)
class Task:
    """State of one token stream; its id is also its place in the order of arrival.

    Times are in seconds of `time.perf_counter`.
    """

    task_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    """Most new tokens, `params.max_tokens` made definite."""
    seed: int
    """The draw at a position depends on this, `sample_index` and the position alone."""
    sample_index: int = 0
    cache_salt: str = ""
    """Tasks share cached prefixes only with tasks of the same salt."""
    client: str = ""
    """Whose task it is; clients get their turns fairly."""
    is_bulk: bool = False
    """Nobody waits for it in front of a screen: chat turns may pass it."""
    tells_progress: bool = False
    """Its reader wants to hear how far its prompt has come."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the task."""
    matcher: TokenMatcher | None = None
    """The form that the output has to have, walked as far as the output goes."""

    token_ids: list[int] = field(default_factory=list[int])
    """Prompt and output."""
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    """Set when the task is first admitted."""
    num_preemptions: int = 0
    admission: int | None = None
    """Its place in the order of first admissions, from the first one on."""
    arrived_at: float = 0.0
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    """Of the second token of the prompt and those after it, as far as they are known."""
    status: TaskStatus = TaskStatus.PENDING

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt has to be computed for what the model thinks of it."""
        is_asked = self.params.prompt_logprobs is not None
        return is_asked and len(self.prompt_logprobs) < len(self.prompt_ids) - 1

    @property
    def num_missing_tokens(self) -> int:
        """Tokens still to compute before the next one can be sampled: 1 when decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def max_computed_tokens(self) -> int:
        """Most positions it can ever hold in the cache: its last token is never computed."""
        return len(self.prompt_ids) + self.max_tokens - 1

    def finish(
        self,
        reason: FinishReason,
        stop: str | None = None,
        message: str | None = None,
        stop_token_id: int | None = None,
    ) -> Finish:
        """Describe the task's end, as of now."""
        return Finish(
            reason=reason,
            stop=stop,
            stop_token_id=stop_token_id,
            message=message,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens or 0,
            num_output_tokens=self.num_output_tokens,
        )
