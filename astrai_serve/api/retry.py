"""When it makes sense to come back to a server that is busy.

OpenAI's and Anthropic's clients wait for `retry-after` if it is above 0 and at most 120 seconds,
and do not try again at all beyond.
"""

import math

from astrai_serve.api.backend import Engine

MAX_SECONDS = 120
_UNMEASURED_SECONDS = 2.0


def clamp(seconds: float) -> int:
    """Round up to what clients honour."""
    return min(MAX_SECONDS, max(1, math.ceil(seconds)))


def retry_seconds(engine: Engine) -> int:
    """Return after how long a place in a full queue is likely to be free.

    It follows from the measured speed of prefill and decoding, the length of answers of late, and
    the work at hand.
    """
    work = engine.seconds_of_work()
    if work is None:
        return clamp(_UNMEASURED_SECONDS)
    # tasks end one after the other, so that one does after its share of the whole
    return clamp(work / max(1, engine.num_open))
