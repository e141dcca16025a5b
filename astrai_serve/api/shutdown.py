"""The generations under way: how they are counted, limited in time, and ended with the server."""

import asyncio

from astrai_serve.api.errors import ApiError, TimeLimitError, UnavailableError
from astrai_serve.api.generation_request import Generation
from astrai_serve.api.metrics import Counter

_MESSAGE = "the server is shutting down"
DISCONNECT, SHUTDOWN, TIME_LIMIT = "disconnect", "shutdown", "time_limit"


class Shutdown:
    """Knows the generations under way, and whether new ones may begin. Lives on the event loop."""

    def __init__(self) -> None:
        self.max_seconds: float | None = None
        """After so long a generation is ended; None sets no limit."""
        self.draining = False
        self.interrupted = False
        self.num_cancelled = Counter((DISCONNECT, SHUTDOWN, TIME_LIMIT))
        """Generations that did not end by themselves, by the reason."""
        self._open: dict[Generation, asyncio.TimerHandle | None] = {}

    def check(self) -> None:
        """Refuse work that would begin now.

        Raises:
            UnavailableError: the server is stopping.
        """
        if self.draining:
            raise UnavailableError(_MESSAGE, retry_after=5)

    @property
    def num_open(self) -> int:
        """Generations under way."""
        return len(self._open)

    def add(self, generation: Generation) -> None:
        """Count a generation as under way, from now on for so many seconds."""
        timer = None
        if self.max_seconds is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self.max_seconds, self._time_out, generation)
        self._open[generation] = timer

    def remove(self, generation: Generation) -> None:
        """Cancel a generation, should it not have ended, and forget it."""
        if not generation.is_over:
            self.num_cancelled.add(DISCONNECT)
        generation.cancel()
        timer = self._open.pop(generation, None)
        if timer is not None:
            timer.cancel()

    def drain(self) -> None:
        """Take no new work."""
        self.draining = True

    def interrupt(self) -> None:
        """Take no new work and end the open generations, each with an error its client reads."""
        self.draining = self.interrupted = True
        for generation in self._open:
            self._end(generation, UnavailableError(_MESSAGE), SHUTDOWN)

    def _time_out(self, generation: Generation) -> None:
        error = TimeLimitError(
            f"the answer took longer than the {self.max_seconds:g} s this server gives to any; "
            "ask for fewer tokens"
        )
        self._end(generation, error, TIME_LIMIT)

    def _end(self, generation: Generation, error: ApiError, reason: str) -> None:
        if not generation.is_over:
            self.num_cancelled.add(reason)
            generation.interrupt(error)
