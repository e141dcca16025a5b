"""What the first request would pay for, paid at the start."""

from astrai_core.generation import FinishReason, SamplingParams
from astrai_serve.engine.engine import InferenceEngine
from astrai_serve.engine.task import GenerationFailedError

_TOKENS = 2  # a prompt's, in one step, and an answer's, in two


def warm_up(engine: InferenceEngine) -> None:
    """Compute one short task for what is compiled and allocated by it.

    What it leaves in the cache and in the engine's statistics is forgotten.

    Raises:
        GenerationFailedError: the model cannot compute a step.
    """
    num_answer = max(1, min(_TOKENS, engine.max_context // 2))
    num_prompt = max(1, min(_TOKENS, engine.max_context - num_answer))
    prompt = [token % engine.vocab_size for token in range(num_prompt)]
    params = SamplingParams(temperature=1, seed=0, max_tokens=num_answer, ignore_eos=True)
    for event in engine.submit(prompt, params):
        if event.finish is not None and event.finish.reason is FinishReason.ERROR:
            raise GenerationFailedError(f"the first step failed: {event.finish.message}")
    engine.update_weights()  # drops the cached prefixes
    engine.restart_statistics()
