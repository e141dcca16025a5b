"""What the first request would pay for, paid at the start, and how fast the engine is then."""

import math
import time
from dataclasses import dataclass

from astrai_core.generation import FinishReason, SamplingParams
from astrai_serve.engine.engine import InferenceEngine
from astrai_serve.engine.task import GenerationFailedError

_PROMPT_TOKENS = 128
_ANSWER_TOKENS = 16
_ANSWER_SECONDS = 0.1
"""An answer that is timed takes no longer, if it has two tokens: who starts a server waits."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second of one task alone."""

    prefill: float
    """Of its prompt, until the first token is there."""
    decode: float
    """Of its answer, after the first token."""

    def __str__(self) -> str:
        return (
            f"{self.prefill:,.0f} prompt tokens/s, {self.decode:,.0f} tokens/s of an answer alone"
        )


def warm_up(engine: InferenceEngine) -> Speed:
    """Compute one short task for what is compiled and allocated by it, and time a second one.

    What both leave in the cache and in the engine's statistics is forgotten, but for the speeds.

    Raises:
        GenerationFailedError: the model cannot compute a step.
    """
    _run(engine, num_prompt=2, num_answer=2)
    num_prompt, num_answer, prefill, decode = _run(engine, _PROMPT_TOKENS, _ANSWER_TOKENS + 1)
    engine.update_weights()  # drops the cached prefixes
    engine.restart_statistics()
    engine.statistics.prefill.add(num_prompt, prefill)
    engine.statistics.decode.add(num_answer, decode)
    return Speed(prefill=num_prompt / prefill, decode=num_answer / decode)


def _run(
    engine: InferenceEngine, num_prompt: int, num_answer: int
) -> tuple[int, int, float, float]:
    """Return the tokens of prompt and answer, and the seconds for each."""
    room = engine.max_context
    num_answer = max(2, min(num_answer, room // 2))
    num_prompt = max(1, min(num_prompt, room - num_answer))
    prompt = [token % engine.vocab_size for token in range(num_prompt)]
    # drawn, for an answer that goes round in circles would be guessed ahead
    params = SamplingParams(temperature=1, seed=0, max_tokens=num_answer, ignore_eos=True)
    engine.update_weights()  # so that the second run computes its prompt, too
    engine.restart_statistics()
    stream = engine.submit(prompt, params)
    num_told, enough = 0, math.inf
    for event in stream:
        now = time.perf_counter()
        num_told += len(event.token_ids)
        if num_told == 1:
            enough = now + _ANSWER_SECONDS
        elif now > enough:
            stream.cancel()
        if event.finish is not None:
            if event.finish.reason is FinishReason.ERROR:
                raise GenerationFailedError(f"the first step failed: {event.finish.message}")
            num_answer = event.finish.num_output_tokens
    # timed by the engine's thread: this one may hear of several tokens at once
    statistics = engine.statistics
    prefill = statistics.request_prefill_time_seconds.sum
    decode = statistics.request_decode_time_seconds.sum
    return num_prompt, num_answer - 1, prefill, decode
