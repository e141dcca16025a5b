"""What the contract of attention must carry besides plain modules: compilation and W8A8 layers.

A step's shape changes all the time, so the compiled model must take any of them; and the engine
must say of a transformed model what the transformed model says by itself.
"""

from typing import Any

import pytest
import torch

from astrai_core.compilation import missing_compiler
from astrai_core.generation import SamplingParams
from astrai_core.model import ModelConfig, Transformer
from astrai_core.model.quantization import quantize_
from astrai_serve.engine import LLM, EngineConfig
from astrai_serve.engine.kv_storage import KVStorage, PagedAttention, Span

VOCAB = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": 32,
    "n_layers": 1,
    "dim_ffn": 48,
    "n_heads": 4,
    "max_len": 128,
}
GQA = ModelConfig(**SHAPE, n_kv_heads=2, use_gated_attention=True, tie_weight=False)
MLA = ModelConfig(
    **SHAPE,
    attn_type="mla",
    use_qk_norm=False,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
)
PAGE = 4
TABLES = [[0, 1, 2], [3, 7, 5], [4, 6]]  # unbroken, broken, short
MIXED = "a chunk, a decoding task, a prompt"
# of each task: how many tokens are in the cache, and how many the step computes
STEPS = {
    "a prompt": [(0, 6)],
    "two prompts": [(0, 7), (0, 3)],
    MIXED: [(6, 4), (7, 1), (0, 5)],
    "two decoding tasks, gathered": [(10, 1), (8, 1)],
    "one decoding task": [(11, 1)],
}
TOLERANCE = 1e-4
CONFIGS = pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
NEEDS_COMPILER = pytest.mark.skipif(
    missing_compiler() is not None, reason=f"this machine has {missing_compiler()}"
)


def build(config):
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() > 1 else 1  # else all tokens are as likely
    return model


def run_steps(forward, config, steps):
    """Logits of each step, and the cache they leave."""
    storage = KVStorage(config, num_pages=8, page_size=PAGE)
    generator = torch.Generator().manual_seed(1)
    for cache in (storage.keys[0], storage.values[0]):
        if cache is not None:
            cache.normal_(generator=generator)
    logits = []
    for step in map(STEPS.__getitem__, steps):
        spans = [
            Span(start=start, length=length, page_table=table)
            for (start, length), table in zip(step, TABLES, strict=False)
        ]
        positions = [torch.arange(start, start + length) for start, length in step]
        ids = torch.randint(VOCAB, (sum(n for _, n in step),), generator=generator)
        ends = torch.tensor([length for _, length in step]).cumsum(0) - 1
        context = PagedAttention.build(storage, spans)
        with torch.inference_mode():
            logits.append(forward(ids, torch.cat(positions), context, ends)["logits"])
    return logits, storage.keys[0]


def compare(config, steps, tmp_path, monkeypatch, *, is_quantised):
    """Step by step, the compiled model says what the plain one says, in one graph per step."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = quantize_(build(config)) if is_quantised else build(config)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    wanted, wanted_cache = run_steps(model, config, steps)
    got, cache = run_steps(compiled, config, steps)
    for step, one, other in zip(steps, got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, msg=step)
    torch.testing.assert_close(cache, wanted_cache, atol=1e-5, rtol=1e-5)


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("config", "is_quantised"),
    [
        pytest.param(GQA, False, marks=pytest.mark.slow, id="gqa"),
        pytest.param(MLA, True, id="mla, w8a8"),
    ],
)
def test_a_compiled_model_takes_a_mixed_step(config, is_quantised, tmp_path, monkeypatch):
    compare(config, [MIXED], tmp_path, monkeypatch, is_quantised=is_quantised)


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("is_quantised", [False, True], ids=["float", "w8a8"])
@CONFIGS
def test_a_compiled_model_takes_steps_of_any_shape(config, is_quantised, tmp_path, monkeypatch):
    compare(config, list(STEPS), tmp_path, monkeypatch, is_quantised=is_quantised)


def prompts():
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(VOCAB, (length,), generator=generator).tolist() for length in (5, 17, 1, 9)
    ]


def said(model, batch):
    """Tokens and their log-probabilities under the sampling of fixed seeds."""
    config = EngineConfig(page_size=PAGE, num_pages=32, max_running_tasks=4, max_step_tokens=16)
    llm = LLM(model, config=config)
    params = [SamplingParams(max_tokens=8, seed=prompt[0]) for prompt in batch]
    completions = llm.generate(batch, params)
    return [(completion.token_ids, torch.tensor(completion.logprobs)) for completion in completions]


def full_forward(model, prompt, token_ids):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *token_ids]]))["logits"][0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


@CONFIGS
def test_a_quantised_model_says_in_the_engine_what_it_says_by_itself(config):
    plain, model = build(config), quantize_(build(config))
    assert isinstance(model, Transformer)
    for prompt, (token_ids, logprobs) in zip(prompts(), said(model, prompts()), strict=True):
        wanted = full_forward(model, prompt, token_ids)
        torch.testing.assert_close(logprobs, wanted, atol=TOLERANCE, rtol=0)
        error = (full_forward(plain, prompt, token_ids) - wanted).abs().max()
        assert error > 10 * TOLERANCE, "it is not the quantised model that is compared"


@CONFIGS
def test_batch_mates_do_not_change_what_a_quantised_model_says(config):
    model = quantize_(build(config))
    for prompt, (token_ids, logprobs) in zip(prompts(), said(model, prompts()), strict=True):
        ((alone_ids, alone),) = said(model, [prompt])
        assert token_ids == alone_ids
        torch.testing.assert_close(logprobs, alone, atol=TOLERANCE, rtol=0)
