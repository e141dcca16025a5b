"""Whether a request that is understood may begin now."""

import math
from collections.abc import Mapping

from astrai_serve.api.backend import Engine
from astrai_serve.api.errors import BusyError, ContextLengthError
from astrai_serve.api.generation_request import GenerationRequest
from astrai_serve.api.retry import clamp
from astrai_serve.api.settings import ServerSettings

_PATIENCE = "x-stainless-read-timeout"


def check_prompt(request: GenerationRequest, settings: ServerSettings) -> None:
    """Refuse prompts longer than this server takes.

    Raises:
        ContextLengthError: says how long they are and may be.
    """
    longest = max(map(len, request.prompts))
    if settings.max_prompt_tokens is not None and longest > settings.max_prompt_tokens:
        raise ContextLengthError(
            f"the prompt has {longest} tokens and this server takes {settings.max_prompt_tokens}; "
            "shorten it"
        )


def check_patience(request: GenerationRequest, engine: Engine, headers: Mapping[str, str]) -> None:
    """Refuse an answer in one piece that would come after its client has given up.

    A stream is not refused: its pings keep the client waiting. The clients tell how long they wait
    for the next byte.

    Raises:
        BusyError: with the time after which the answer would come in time.
    """
    patience = _seconds(headers.get(_PATIENCE, ""))
    work = engine.seconds_of_work()
    if request.stream or patience is None or not work:
        return
    if work > patience:
        raise BusyError(
            f"{work:.0f} s of work are waiting, longer than the {patience:.0f} s for which this "
            "client waits; stream the answer, or try again later",
            code="too_much_work",
            retry_after=clamp(work - patience),
        )


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
