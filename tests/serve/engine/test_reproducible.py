"""The same request and seed give the same tokens and log-probabilities, to the last bit."""

import random
from typing import Any

import pytest
import torch

from astrai_core.generation import SamplingParams
from astrai_core.model import ModelConfig, Transformer
from astrai_core.model.fusion import fuse_
from astrai_core.model.quantization import quantize_
from astrai_serve.engine import EngineConfig
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.native_attention import why_not_native

SHAPE: dict[str, Any] = {
    "vocab_size": 67, "dim": 48, "n_layers": 2, "dim_ffn": 64, "n_heads": 4, "max_len": 256
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "gqa, gated": {"n_kv_heads": 2, "use_gated_attention": True},
    "mqa, window, untied": {
        "n_kv_heads": 1,
        "use_gated_attention": True,
        "attention_gate": "elementwise",
        "sliding_window": 11,
        "tie_weight": False,
    },
}
needs_kernel = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))


def make(**fields):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE, **fields)).eval()
    for parameter in model.parameters():
        parameter.data *= 5 if parameter.dim() > 1 else 1
    return model


@pytest.fixture(scope="module", params=MODELS.values(), ids=list(MODELS))
def model(request):
    model = make(**request.param)
    quantize_(model, "w8a8")
    return fuse_(model)


@pytest.fixture(scope="module")
def alone(model):
    """What each request hears when one comes after the other."""
    heard, _ = run(model)
    assert all(len(logprobs) == 20 for logprobs in heard.values())
    return heard


def requests():
    chance = random.Random(0)
    stem = [chance.randrange(67) for _ in range(140)]
    prompts = [[chance.randrange(67) for _ in range(n)] for n in (1, 3, 9, 33, 70, 130)]
    prompts += [[*stem[:n], 1, 2] for n in (12, 13, 64, 140)]
    return [
        (prompt, SamplingParams(temperature=n % 2, seed=n, max_tokens=20, logprobs=3))
        for n, prompt in enumerate(prompts)
    ]


def run(model, seed=None, **config):
    """What each request hears; with a seed they come in any order and while others are answered."""
    config = {
        "page_size": 4,
        "num_pages": 200,
        "max_step_tokens": 256,
        "reproducible": True,
    } | config
    core = EngineCore.of_model(model, None, EngineConfig(**config))
    waiting, chance = list(enumerate(requests())), random.Random(seed)
    if seed is not None:
        chance.shuffle(waiting)
    numbers: list[int] = []
    heard: dict[int, list[object]] = {}
    while waiting or core.has_tasks:
        while waiting and (not core.has_tasks or (seed is not None and chance.random() < 0.5)):
            number, (prompt, params) = waiting.pop(0)
            core.add(core.new_task(len(numbers), prompt, params))
            numbers.append(number)
        for task_id, event in core.step():
            heard.setdefault(numbers[task_id], []).extend(event.logprobs)
    return heard, core.stats()


@needs_kernel
@pytest.mark.parametrize("chunk", [1, 7, 32, None])
def test_chunks_and_company_change_no_bit(model, alone, chunk):
    together, stats = run(model, seed=chunk or 0, max_chunk_tokens=chunk)
    assert stats["prefix_cache_hits"] > 0
    assert together == alone


@needs_kernel
def test_preemption_and_a_cold_cache_change_no_bit(model, alone):
    crowded, stats = run(model, seed=1, num_pages=48, headroom_pages=0)
    assert stats["num_preemptions"] > 0
    assert crowded == alone
    cold, stats = run(model, seed=2, prefix_caching=False)
    assert stats["prefix_cache_hits"] == 0
    assert cold == alone


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (make(), "not w8a8: quantise them"),
        (make(attn_type="mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
              v_head_dim=12, use_qk_norm=False), "latent attention"),
    ],
    ids=["fp32", "mla"],
)  # fmt: skip
def test_what_cannot_be_promised_is_refused(model, why):
    with pytest.raises(ValueError, match=f"reproducible cannot be promised here: .*{why}"):
        EngineCore.of_model(model, None, EngineConfig(num_pages=64, reproducible=True))
