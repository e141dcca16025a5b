"""How the server stops: no new work, time for the work at hand, a word to those who still wait."""

from astrai_serve.api.errors import UnavailableError
from astrai_serve.api.generation_request import Generation

_MESSAGE = "the server is shutting down"


class Shutdown:
    """Knows the generations under way, and whether new ones may begin. Lives on the event loop."""

    def __init__(self) -> None:
        self.draining = False
        self.interrupted = False
        self._open: set[Generation] = set()

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
        """Count a generation as under way."""
        self._open.add(generation)

    def remove(self, generation: Generation) -> None:
        """Cancel a generation, should it not have ended, and forget it."""
        generation.cancel()
        self._open.discard(generation)

    def drain(self) -> None:
        """Take no new work."""
        self.draining = True

    def interrupt(self) -> None:
        """Take no new work and end the open generations, each with an error its client reads."""
        self.draining = self.interrupted = True
        for generation in self._open:
            generation.interrupt(_MESSAGE)
