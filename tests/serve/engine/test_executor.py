"""The engine on real models against the full forward pass of each answer, in fp32."""

from typing import Any

import pytest
import torch

from astrai_core.generation import SamplingParams
from astrai_core.model import ModelConfig, Transformer
from astrai_serve.engine import EngineConfig
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.executor import Executor

TOLERANCE = 1e-4
SHAPE: dict[str, Any] = {
    "vocab_size": 67,
    "dim": 48,
    "n_layers": 2,
    "dim_ffn": 64,
    "n_heads": 4,
    "max_len": 128,
}
LATENT: dict[str, Any] = {
    "attn_type": "mla",
    "use_qk_norm": False,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
MODELS: dict[str, dict[str, Any]] = {
    "gqa, qk-norm, headwise gate, tied": {"n_kv_heads": 2, "use_gated_attention": True},
    "mqa, elementwise gate, window, untied": {
        "n_kv_heads": 1,
        "use_gated_attention": True,
        "attention_gate": "elementwise",
        "use_qk_norm": False,
        "sliding_window": 11,
        "tie_weight": False,
    },
    "mla, tied": LATENT,
    "mla, query latent, untied": {**LATENT, "q_lora_rank": 20, "tie_weight": False},
}
GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=3)
PAGE = 4


@pytest.fixture(scope="module", params=MODELS.values(), ids=list(MODELS))
def model(request):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE, **request.param)).eval()
    for parameter in model.parameters():
        parameter.data *= 5 if parameter.dim() > 1 else 1  # else all tokens are as likely
    return model


@pytest.fixture(params=[1, 7, 32, None], ids=lambda size: f"chunks of {size or 'all'}")
def runner(request, model):
    return Runner(model, max_chunk_tokens=request.param)


class Runner:
    """The engine, keeping the logits behind every token it says."""

    def __init__(self, model, **changes):
        self.model = model
        config: dict[str, Any] = {"page_size": PAGE, "num_pages": 64, "max_step_tokens": 64}
        config["speculative_tokens"] = 0  # for it knows which logits belong to no guess
        config |= changes
        self.core = EngineCore.of_model(model, None, EngineConfig(**config))
        self.tasks, self.logits, self.logprobs, self.ends = [], {}, {}, {}
        executor = self.core.executor
        assert isinstance(executor, Executor)
        self._logits_of = executor.logits
        executor.logits = self._watched

    def _watched(self, chunks):
        logits = self._logits_of(chunks)
        tasks = [chunk.task for chunk in chunks if chunk.samples]
        for task, row in zip(tasks, logits, strict=True):
            self.logits.setdefault(task.task_id, []).append(row.clone())
        return logits

    def add(self, prompt, params=GREEDY):
        task = self.core.new_task(len(self.tasks), prompt, params)
        self.tasks.append(task)
        self.core.add(task)
        return task

    def steps(self, count=1000):
        while self.core.has_tasks and count:
            for task_id, event in self.core.step():
                self.logprobs.setdefault(task_id, []).extend(event.logprobs)
                self.ends[task_id] = event.finish
            self.core.check_invariants()
            count -= 1

    def check(self):
        """Every task said what the full forward says, with its log-probabilities."""
        self.steps()
        for task in self.tasks:
            assert self.ends[task.task_id].reason == "length"
            got = torch.stack(self.logits[task.task_id])
            with torch.no_grad():
                wanted = self.model(torch.tensor([task.token_ids]))["logits"][0]
            wanted = wanted[task.num_prompt_tokens - 1 : -1]
            assert (got - wanted).abs().max() < TOLERANCE
            self._check_tokens(task, wanted)

    def _check_tokens(self, task, wanted):
        top, normed = wanted.topk(2).values, wanted.log_softmax(-1)
        is_clear = top[:, 0] - top[:, 1] > TOLERANCE
        said = torch.tensor(task.token_ids[task.num_prompt_tokens :])
        assert is_clear.float().mean() > 0.9
        assert torch.equal(said[is_clear], wanted.argmax(-1)[is_clear])
        for n, entry in enumerate(self.logprobs[task.task_id]):
            assert entry.token_id == said[n]
            assert entry.logprob == pytest.approx(normed[n, said[n]].item(), abs=TOLERANCE)
            values = torch.tensor([value for _, value in entry.top])
            torch.testing.assert_close(values, normed[n].topk(3).values, atol=TOLERANCE, rtol=0)
            for token_id, value in entry.top:
                assert value == pytest.approx(normed[n, token_id].item(), abs=TOLERANCE)


def prompt(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(67, (length,), generator=generator).tolist()


@pytest.mark.parametrize("length", [1, PAGE, 3 * PAGE, 41], ids=lambda n: f"{n} tokens")
def test_a_cold_prompt(runner, length):
    runner.add(prompt(0, length))
    runner.check()


def test_a_prefix_hit(runner):
    runner.add(prompt(0, 10))
    runner.steps()
    task = runner.add(prompt(0, 10)[:9] + prompt(1, 8))
    runner.check()
    assert task.num_cached_tokens == 2 * PAGE


@pytest.mark.parametrize("length", [3 * PAGE, 3 * PAGE + 1])
def test_a_repeated_prompt_computes_at_least_its_last_token(runner, length):
    first = runner.add(prompt(0, length))
    runner.steps()
    second = runner.add(prompt(0, length))
    runner.check()
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == (length - 1) // PAGE * PAGE
    assert first.token_ids == second.token_ids


def test_a_conversation_finds_its_own_answer(runner):
    first = runner.add(prompt(0, 6))
    runner.steps()
    second = runner.add([*first.token_ids, *prompt(1, 5)])
    runner.check()
    assert second.num_cached_tokens == (len(first.token_ids) - 1) // PAGE * PAGE


def test_a_ragged_batch(runner):
    for seed, length in enumerate((1, 17, 5, 8, 33, 2)):
        runner.add(prompt(seed, length))
    runner.check()


def test_joining_mid_flight(runner):
    runner.add(prompt(0, 9))
    runner.steps(3)
    runner.add(prompt(1, 21))
    runner.steps(2)
    runner.add(prompt(0, 9)[:8] + prompt(2, 3))
    runner.check()


def test_the_same_prompt_at_once_is_computed_once(runner):
    tasks = [runner.add(prompt(0, 13)) for _ in range(3)]
    runner.check()
    assert [task.num_cached_tokens for task in tasks] == [0, 3 * PAGE, 3 * PAGE]


@pytest.mark.parametrize("chunk", [1, 7, 32, None], ids=lambda size: f"chunks of {size or 'all'}")
def test_after_preemption(model, chunk):
    runner = Runner(model, num_pages=8, max_chunk_tokens=chunk, headroom_pages=0)
    for seed in range(4):
        runner.add(prompt(seed, 5), SamplingParams(temperature=0, max_tokens=20, logprobs=3))
    runner.check()
    assert max(task.num_preemptions for task in runner.tasks) > 0
    assert runner.tasks[0].num_preemptions == 0


def test_after_a_change_of_weights_in_mid_answer(model):
    runner = Runner(model)
    task = runner.add(prompt(0, 10))
    runner.steps(4)
    weight = model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    try:
        weight.data.add_(0.1)
        runner.core.drop_computed()
        runner.steps()
        with torch.no_grad():
            wanted = model(torch.tensor([task.token_ids]))["logits"][0, 9:-1]
    finally:
        weight.data.copy_(before)
    error = (torch.stack(runner.logits[0]) - wanted).abs().amax(1)
    assert error[:4].max() > 10 * TOLERANCE
    assert error[4:].max() < TOLERANCE


@pytest.mark.parametrize("num_pages", [64, 18])
def test_log_probabilities_of_prompts_are_those_of_the_whole_pass(model, num_pages):
    config = EngineConfig(page_size=PAGE, num_pages=num_pages, max_step_tokens=33, headroom_pages=0)
    core = EngineCore.of_model(model, None, config)
    prompts = [[(7 * n + 3 * m) % 67 for n in range(29)] for m in (0, 0, 1)]
    params = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=2)
    tasks = [core.new_task(n, prompt, params) for n, prompt in enumerate(prompts)]
    for task in tasks:
        core.add(task)
    events: dict[int, Any] = {}
    while core.has_tasks:
        for task_id, event in core.step():
            events[task_id] = events[task_id] + event if task_id in events else event
    for n, prompt in enumerate(prompts):
        with torch.no_grad():
            scores = model(torch.tensor([prompt]))["logits"][0, :-1].log_softmax(-1)
        told = events[n].prompt_logprobs
        assert [one.token_id for one in told] == prompt[1:]
        truth = scores.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor([one.logprob for one in told]), truth, atol=TOLERANCE, rtol=0
        )
        tops = torch.tensor([[logprob for _, logprob in one.top] for one in told])
        torch.testing.assert_close(tops, scores.topk(2).values, atol=TOLERANCE, rtol=0)
    if num_pages == 18:
        assert core.stats()["num_preemptions"] > 0
    assert core.stats()["prefix_cache_hits"] == 0 or num_pages == 18
