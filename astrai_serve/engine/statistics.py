"""What the engine measures of itself; its thread writes, any thread may read.

A reader may see a step half counted, which no figure here minds.
"""

from bisect import bisect_left
from collections.abc import Sequence

from astrai_serve.engine.task import Finish, Task

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
# how much of what is known is left after a step, or an answer, was added to it
_STEP_MEMORY = 0.98
_ANSWER_MEMORY = 0.9
_EXPECTED_TOKENS = 16  # what a speed counts for that no step has told


class Histogram:
    """Counts of values up to each bound.

    Args:
        bounds: ascending; what is above the last one is counted without a bound.
    """

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        """Values above the bound before and up to this one; the last has no bound."""
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Rate:
    """Tokens a second, of late."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, num_tokens: float, seconds: float) -> None:
        """Add what was just seen."""
        self._tokens = self._tokens * _STEP_MEMORY + num_tokens
        self._seconds = self._seconds * _STEP_MEMORY + seconds

    @property
    def per_second(self) -> float | None:
        """The rate; None before anything was seen."""
        return self._tokens / self._seconds if self._seconds > 0 else None


class Statistics:
    """Durations in seconds, lengths in tokens, and speeds.

    Histograms have the names under which dashboards know them. Queue time runs to the first
    admission, prefill time from there to the first token, decode time from there to the last.
    """

    def __init__(self) -> None:
        self.time_to_first_token_seconds = Histogram(_SECONDS)
        self.inter_token_latency_seconds = Histogram(_GAPS)
        self.e2e_request_latency_seconds = Histogram(_SECONDS)
        self.request_queue_time_seconds = Histogram(_SECONDS)
        self.request_prefill_time_seconds = Histogram(_SECONDS)
        self.request_decode_time_seconds = Histogram(_SECONDS)
        self.request_prompt_tokens = Histogram(_TOKENS)
        self.request_generation_tokens = Histogram(_TOKENS)
        self.iteration_tokens = Histogram(_TOKENS)
        self.prefill = Rate()
        """Prompt tokens a second in steps that compute any, their decoded tokens taken off."""
        self.decode = Rate()
        """Tokens a second in steps that compute no prompt, all tasks together."""
        self.answer_tokens: float | None = None
        """Length of an answer, of late; None before the first has ended."""

    def histograms(self) -> dict[str, Histogram]:
        """All histograms by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Histogram)}

    def expect(self, prefill: float, decode: float) -> None:
        """Take tokens a second that were measured otherwise, until steps have told better."""
        for rate, expected in ((self.prefill, prefill), (self.decode, decode)):
            if rate.per_second is None:
                rate.add(_EXPECTED_TOKENS, _EXPECTED_TOKENS / expected)

    def step(self, num_prompt_tokens: int, num_decoded: int, seconds: float) -> None:
        """Count a step."""
        self.iteration_tokens.observe(num_prompt_tokens + num_decoded)
        if not num_prompt_tokens:
            self.decode.add(num_decoded, seconds)
            return
        decode = self.decode.per_second
        # a token in a large step costs no more than one in a small one: a share at most
        share = num_decoded / (num_decoded + num_prompt_tokens)
        decoding = share * seconds if decode is None else min(num_decoded / decode, share * seconds)
        self.prefill.add(num_prompt_tokens, seconds - decoding)

    def token(self, task: Task, now: float) -> None:
        """Count a token of a task."""
        if task.last_token_at is not None:
            self.inter_token_latency_seconds.observe(now - task.last_token_at)
        elif task.admitted_at is not None:
            self.time_to_first_token_seconds.observe(now - task.arrived_at)
            self.request_prefill_time_seconds.observe(now - task.admitted_at)
            task.first_token_at = now
        task.last_token_at = now

    def admitted(self, task: Task, now: float) -> None:
        """Count an admission, the first of a task only."""
        if task.admitted_at is None:
            task.admitted_at = now
            self.request_queue_time_seconds.observe(now - task.arrived_at)

    def ended(self, task: Task, finish: Finish, now: float) -> None:
        """Count the end of a task."""
        self.e2e_request_latency_seconds.observe(now - task.arrived_at)
        self.request_prompt_tokens.observe(finish.num_prompt_tokens)
        self.request_generation_tokens.observe(finish.num_output_tokens)
        if task.first_token_at is not None and task.last_token_at is not None:
            self.request_decode_time_seconds.observe(task.last_token_at - task.first_token_at)
            known = self.answer_tokens or finish.num_output_tokens
            self.answer_tokens = known + (1 - _ANSWER_MEMORY) * (finish.num_output_tokens - known)

    def seconds_of(self, tasks: Sequence[Task]) -> float | None:
        """Return how long all these tasks take together; None before speeds are known.

        Tasks that did not say how much they want are taken to want what others got of late.
        """
        prefill, decode = self.prefill.per_second, self.decode.per_second
        if prefill is None or decode is None:
            return None
        seconds = 0.0
        for task in tasks:
            missing = task.num_missing_tokens
            seconds += missing / prefill if missing > 1 else 0.0
            seconds += self.tokens_to_come(task.max_tokens, task.num_output_tokens) / decode
        return seconds

    def tokens_to_come(self, max_tokens: int, num_output_tokens: int = 0) -> float:
        """Return how many tokens a task is expected to say yet."""
        usual = max_tokens if self.answer_tokens is None else self.answer_tokens
        # who is past the usual length may end any time: half of it again is a guess
        likely = max(usual - num_output_tokens, usual / 2 if num_output_tokens else usual)
        return min(likely, max_tokens - num_output_tokens)
