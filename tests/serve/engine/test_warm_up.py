"""A step that was computed, and nothing left behind."""

import pytest
import torch

from astrai_core.model import ModelConfig, Transformer
from astrai_serve import InferenceEngine
from astrai_serve.engine import EngineConfig
from astrai_serve.engine.task import GenerationFailedError
from astrai_serve.engine.warm_up import warm_up


@pytest.mark.parametrize("max_len", [3, 64, 300])
def test_a_step_is_computed_and_no_trace_is_left(max_len):
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, dim_ffn=16, max_len=max_len)
    engine = InferenceEngine(Transformer(shape).eval(), None, EngineConfig(page_size=4))
    steps: list[int] = []
    step = engine._core.step
    engine._core.step = lambda: steps.append(1) or step()
    warm_up(engine)
    stats, statistics = engine.stats(), engine.statistics
    engine.close()
    assert steps
    assert (stats["num_cached_pages"], stats["kv_cache_usage"]) == (0, 0)
    assert sum(statistics.iteration_tokens.counts) == 0
    assert statistics.prefill.per_second is None


def test_a_model_that_cannot_compute_is_found_at_the_start():
    shape = ModelConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, dim_ffn=16, max_len=64)
    model = Transformer(shape).eval()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    engine = InferenceEngine(model, None, EngineConfig(page_size=4))
    with pytest.raises(GenerationFailedError, match="not finite"):
        warm_up(engine)
    engine.close()
