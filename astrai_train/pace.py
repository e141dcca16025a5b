"""How long what is left of a run will take."""

from bisect import bisect_left

_MOST = 1000


class Pace:
    """The moments at which steps were done, and what follows from them.

    All that happens between steps counts: validations, checkpoints and samples too. The first step
    does not, for it waits for the compiler; nor does the first half of what was seen, so that a
    machine that others use now and then is followed.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, float]] = []

    def record(self, step: int, moment: float) -> None:
        """Note when a step was done; one from before the last begins anew.

        Args:
            step: optimizer steps done.
            moment: in seconds.
        """
        if self._seen and step < self._seen[-1][0]:
            self._seen.clear()
        if self._seen and step == self._seen[-1][0]:
            return
        self._seen.append((step, moment))
        if len(self._seen) > _MOST:
            del self._seen[1:-1:2]  # a run of millions of steps is as well told by few

    @property
    def last_gap(self) -> float:
        """Seconds between the last two moments; 0 before there are two."""
        return self._seen[-1][1] - self._seen[-2][1] if len(self._seen) > 1 else 0.0

    def seconds_left(self, total: int, now: float) -> float | None:
        """Seconds until `total` steps are done; None before two moments are known."""
        if len(self._seen) < 2:
            return None
        last, latest = self._seen[-1]
        middle = bisect_left(self._seen, (self._seen[0][0] + last) / 2, key=lambda seen: seen[0])
        since, earlier = self._seen[min(middle, len(self._seen) - 2)]
        pace = (latest - earlier) / (last - since)
        return max(0.0, pace * (total - last) - (now - latest))
