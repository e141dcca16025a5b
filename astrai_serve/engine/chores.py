"""Work that the engine's thread does beside its steps, a piece for each `next`."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

_SHARE = 0.05
"""Of the time, at most, is for chores while there are tasks."""


class Chores:
    """Iterators that are run to their ends, one after the other.

    A task that comes waits for the piece under way. Work that fails is told to the log and dropped,
    for the engine can do without.

    Args:
        clock: seconds; tests pass their own.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._small: deque[Iterator[None]] = deque()
        self._large: deque[Iterator[None]] = deque()
        self._rests_until = 0.0

    def __len__(self) -> int:
        return len(self._small) + len(self._large)

    @property
    def has_small(self) -> bool:
        """Whether there is work that need not wait until the engine has been idle for a while."""
        return bool(self._small)

    def add(self, work: Iterator[None], *, is_small: bool) -> None:
        """Add work to its kind's others.

        Args:
            work: what is to be done.
            is_small: its pieces take milliseconds, and may be done between two steps.
        """
        (self._small if is_small else self._large).append(work)

    def while_idle(self) -> None:
        """Do one piece, of small work first."""
        self._advance(self._small or self._large)

    def between_steps(self) -> None:
        """Do one piece of small work, unless the last one is not long enough ago."""
        began = self._clock()
        if self._small and began >= self._rests_until:
            self._advance(self._small)
            ended = self._clock()
            self._rests_until = ended + (ended - began) * (1 / _SHARE - 1)

    @staticmethod
    def _advance(works: deque[Iterator[None]]) -> None:
        try:
            next(works[0])
        except StopIteration:
            works.popleft()
        except Exception:
            logger.exception("work that was done beside the steps has failed")
            works.popleft()
