"""The same request and seed give the same tokens and log-probabilities, to the last bit."""

import random
from typing import Any

import pytest
import torch
from torch import nn

from astrai_core.generation import SamplingParams
from astrai_core.model import ModelConfig, Transformer
from astrai_core.model.quantization import Choice, Scheme, quantize_
from astrai_serve.engine import EngineConfig
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.native_attention import why_not_native
from astrai_serve.engine.reproducible import make_reproducible_

SHAPE: dict[str, Any] = {
    "vocab_size": 67, "dim": 48, "n_layers": 2, "dim_ffn": 64, "n_heads": 4, "max_len": 256
}  # fmt: skip
LATENT = {
    "attn_type": "mla", "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 12, "use_qk_norm": False,
}  # fmt: skip
EXPERTS = {
    "ffn_type": "moe", "n_routed_experts": 8, "n_activated_experts": 3, "dim_ffn_expert": 24,
    "n_shared_experts": 1,
}  # fmt: skip
MODELS: dict[str, tuple[Scheme | torch.dtype | None, dict[str, Any]]] = {
    "w8a8, gqa, gated": ("w8a8", {"n_kv_heads": 2, "use_gated_attention": True}),
    "w8a8, mqa, window, untied": (
        "w8a8",
        {
            "n_kv_heads": 1,
            "use_gated_attention": True,
            "attention_gate": "elementwise",
            "sliding_window": 11,
            "tie_weight": False,
        },
    ),
    "w8a8, latent, gated": ("w8a8", {**LATENT, "q_lora_rank": 24, "use_gated_attention": True}),
    "w8a8, experts by softmax": ("w8a8", {**EXPERTS, "n_kv_heads": 2}),
    "w8a8, latent, experts by sigmoid": (
        "w8a8",
        {
            **LATENT,
            **EXPERTS,
            "moe_scoring": "sigmoid",
            "moe_topk_method": "noaux_tc",
            "n_expert_groups": 4,
            "n_activated_groups": 2,
            "norm_topk_prob": True,
            "first_k_dense": 1,
        },
    ),
    "fp32, gqa, gated": (None, {"n_kv_heads": 2, "use_gated_attention": True}),
    "fp32, biases, untied": (
        None,
        {"attention_bias": True, "ffn_bias": True, "tie_weight": False, "use_qk_norm": False},
    ),
    "fp32, latent, experts": (None, {**LATENT, **EXPERTS}),
    "bf16, gqa": (torch.bfloat16, {"n_kv_heads": 2, "use_gated_attention": True}),
    "bf16, latent, experts": (torch.bfloat16, {**LATENT, **EXPERTS}),
    "int8": ("int8", {"n_kv_heads": 2}),
    "int4": ("int4", {"n_kv_heads": 2}),
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
    form, fields = request.param
    model = make(**fields)
    if isinstance(form, torch.dtype):
        model.to(form)
    elif form is not None:
        quantize_(model, form)
    make_reproducible_(model)
    return model


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


@needs_kernel
@pytest.mark.parametrize("fields", [{"n_kv_heads": 2}, {**LATENT, **EXPERTS}], ids=["gqa", "mla"])
def test_a_model_that_becomes_reproducible_says_what_it_did(fields):
    model, ids = make(**fields), torch.arange(60)[None] % 67
    with torch.inference_mode():
        before = model(ids)["logits"]
        make_reproducible_(model)
        torch.testing.assert_close(model(ids)["logits"], before, rtol=1e-4, atol=1e-5)


class _Foreign(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@needs_kernel
def test_what_cannot_be_promised_is_refused():
    model = make()
    mlp = model.get_submodule("layers.1.mlp")
    mlp.add_module("down_proj", _Foreign(mlp.down_proj))
    why = r"reproducible cannot be promised here: layers\.1\.mlp\.down_proj is a _Foreign"
    with pytest.raises(ValueError, match=why):
        EngineCore.of_model(model, None, EngineConfig(num_pages=64, reproducible=True))


@needs_kernel
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_products_of_torchs_are_refused(monkeypatch, scheme):
    model = make()
    quantize_(model, scheme)
    missing = Choice(kernel=lambda x, *_: x, is_native=False, reason="there is no compiler")
    monkeypatch.setattr("astrai_serve.engine.reproducible.choose", lambda: missing)
    with pytest.raises(ValueError, match=r"promised here: .*: there is no compiler"):
        EngineCore.of_model(model, None, EngineConfig(num_pages=64, reproducible=True))


@pytest.mark.parametrize("missing", ["why_not_native", "why_not_fused", "why_not_rowwise"])
def test_without_the_compiled_operators_it_is_refused(monkeypatch, missing):
    monkeypatch.setattr(f"astrai_serve.engine.reproducible.{missing}", lambda: "no compiler")
    with pytest.raises(ValueError, match=r"promised here: the compiled operators .*: no compiler"):
        EngineCore.of_model(make(), None, EngineConfig(num_pages=64, reproducible=True))
