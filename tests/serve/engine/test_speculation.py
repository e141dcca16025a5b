"""Guesses cost little where they fail, and change no answer where they hold."""

import random
from typing import Any

import pytest
import torch

from astrai_core.generation import FinishReason, SamplingParams
from astrai_core.model import ModelConfig, Transformer
from astrai_core.model.quantization import quantize_
from astrai_serve.engine import EngineConfig
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.native_attention import why_not_native
from astrai_serve.engine.speculation import (
    LONGEST_PAUSE,
    NGRAMS,
    SHORTEST_PAUSE,
    WINDOW,
    PromptLookup,
    Speculation,
)
from astrai_serve.engine.task import Task

VOCAB = 67
LOOP = [3, 14, 15, 9, 26, 5]
needs_kernel = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))


def looked_up(token_ids, limit):
    """The guesses, by looking through all tokens."""
    for n in NGRAMS:
        for start in range(len(token_ids) - 1, n - 1, -1):
            if token_ids[start - n : start] == token_ids[-n:]:
                guesses = list(token_ids)
                for _ in range(limit):
                    guesses.append(guesses[start + len(guesses) - len(token_ids)])
                return guesses[len(token_ids) :]
    return []


@pytest.mark.parametrize("seed", range(4))
def test_the_index_finds_what_a_search_finds(seed):
    chance, lookup = random.Random(seed), PromptLookup()
    token_ids = [chance.randrange(3 + 3 * seed) for _ in range(40)]
    for _ in range(200):
        guesses = lookup.propose(token_ids, 2)
        assert guesses == looked_up(token_ids, 2)
        token_ids += [chance.randrange(3 + 3 * seed) for _ in range(chance.randrange(1, 4))]


def test_a_loop_goes_on():
    assert PromptLookup().propose([7, 5, 5, 5], 2) == [5, 5]


def test_the_index_is_bounded():
    chance, lookup = random.Random(0), PromptLookup()
    token_ids = [chance.randrange(10**9) for _ in range(3 * WINDOW)]
    for end in range(WINDOW, 3 * WINDOW, 100):
        lookup.propose(token_ids[:end], 4)
        assert all(len(places) <= 2 * WINDOW + 100 for places in lookup._behind.values())
    assert lookup.propose([*token_ids, *token_ids[-50:-45]], 2) == token_ids[-45:-43]


def test_who_guesses_wrong_guesses_less_and_rests_longer():
    lookup, token_ids = PromptLookup(), LOOP * 3
    lengths, pauses, silent = [], [], 0
    for _ in range(4000):
        if guesses := lookup.propose(token_ids, 7):
            lengths.append(len(guesses))
            pauses.append(silent)
            lookup.learn(len(token_ids), len(guesses), 0)
            silent = 0
        else:
            silent += 1
        token_ids = [*token_ids, LOOP[len(token_ids) % len(LOOP)]]
    assert lengths[0] == 2
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1
    rests = [pause for pause in pauses if pause]
    assert rests[0] == SHORTEST_PAUSE - 1
    assert rests == sorted(rests)
    assert max(rests) == LONGEST_PAUSE - 1
    assert len(lengths) < 20, "it costs something all the time"
    while not (guesses := lookup.propose(token_ids, 7)):
        token_ids = [*token_ids, LOOP[len(token_ids) % len(LOOP)]]
    for wanted in (1, 2, 4, 7, 7):  # and once they hold, there are more again
        guesses = lookup.propose(token_ids, 7)
        assert len(guesses) == wanted
        token_ids = token_ids + guesses
        lookup.learn(len(token_ids), wanted, wanted)


def test_no_guess_reaches_a_stop_token():
    task = Task(
        task_id=0, prompt_ids=(*LOOP, *LOOP), params=SamplingParams(), max_tokens=9, seed=0,
        stop_ids=frozenset({LOOP[2]}),
    )  # fmt: skip
    speculation = Speculation(4)
    assert speculation.propose(task, 4) == LOOP[:2]
    assert speculation.propose(task, 0) == []
    speculation.forget(task)
    assert speculation.is_idle


def make(scheme=None):
    torch.manual_seed(0)
    shape: dict[str, Any] = {"dim": 48, "n_layers": 2, "dim_ffn": 64, "n_heads": 4}
    model = Transformer(ModelConfig(vocab_size=VOCAB, max_len=256, n_kv_heads=2, **shape)).eval()
    for parameter in model.parameters():
        parameter.data *= 5 if parameter.dim() > 1 else 1
    if scheme is not None:
        quantize_(model, scheme)
    return model


@pytest.fixture(scope="module")
def model():
    return make("w8a8")


def letters(token_id):
    return b"%c" % (33 + token_id)


def answer(model, num_guesses, requests, **config):
    """What each request hears, all of them together, and the engine's counts."""
    config = {"page_size": 4, "num_pages": 200, "reproducible": True} | config
    core = EngineCore.of_model(model, None, EngineConfig(speculative_tokens=num_guesses, **config))
    core._token_bytes = letters
    for n, (prompt, params) in enumerate(requests):
        core.add(core.new_task(n, prompt, params))
    events: dict[int, Any] = {}
    while core.has_tasks:
        for task_id, event in core.step():
            events[task_id] = events[task_id] + event if task_id in events else event
        core.check_invariants()
    core.check_idle()
    return events, core.stats()


# narrow draws repeat themselves, and do not for long
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1.5, "top_k": 2, "seed": 3},
    "drawn from all": {"temperature": 0.4, "seed": 1},
    "penalties": {
        "temperature": 0, "repetition_penalty": 1.05, "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
    },
    "biased": {"temperature": 0.5, "seed": 2, "logit_bias": ((5, 3.0), (9, 3.0))},
}  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=list(SAMPLING))
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_answers_are_the_same_to_the_last_bit(model, sampling, num_tasks):
    params = SamplingParams(max_tokens=90, logprobs=3, **sampling)
    requests = [(LOOP * 4 + LOOP[:n], params) for n in range(1, num_tasks + 1)]
    plain, stats = answer(model, 0, requests)
    assert stats["draft_tokens"] == 0
    guessed, stats = answer(model, 7, requests)
    assert stats["draft_tokens"] >= stats["accepted_tokens"] > 0
    assert stats["draft_tokens"] > stats["accepted_tokens"] or params.temperature < 1
    assert guessed == plain


@needs_kernel
def test_answers_are_the_same_when_pages_run_out(model):
    params = SamplingParams(temperature=0, max_tokens=60, logprobs=0)
    requests = [(LOOP * 2 + LOOP[:n], params) for n in range(1, 4)]
    plain, _ = answer(model, 0, requests)
    guessed, stats = answer(model, 7, requests, num_pages=36, headroom_pages=0, max_context=100)
    assert stats["num_preemptions"] > 0
    assert stats["accepted_tokens"] > 0
    assert {n: event.token_ids for n, event in guessed.items()} == {
        n: event.token_ids for n, event in plain.items()
    }
    assert [guessed[n].logprobs for n in range(3)] == [plain[n].logprobs for n in range(3)]


@needs_kernel
def test_an_answer_ends_inside_a_draft(model):
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 90}
    whole, stats = answer(model, 7, [(LOOP * 4, SamplingParams(**params))])
    said = whole[0].token_ids
    assert stats["num_steps"] < 60, "too few guesses hold for a test of ends"
    reasons = []
    for length in range(44, 54):
        ends = [
            SamplingParams(temperature=0, max_tokens=length),
            SamplingParams(stop_token_ids=(said[length],), min_tokens=length, **params),
            SamplingParams(
                stop=("".join(letters(i).decode() for i in said[length - 1 : length + 1]),),
                min_tokens=length,
                **params,
            ),
        ]
        for end in ends:
            plain, _ = answer(model, 0, [(LOOP * 4, end)])
            guessed, _ = answer(model, 7, [(LOOP * 4, end)])
            assert guessed == plain
            if end is not ends[1]:  # min_tokens forbids a stop token, and so changes the answer
                assert guessed[0].token_ids == said[: length + (end is ends[2])]
            reasons.append(guessed[0].finish.reason)
    assert reasons.count(FinishReason.STOP) >= 10


def test_floats_say_the_same_but_for_rounding():
    params = SamplingParams(temperature=0, max_tokens=60, logprobs=2)
    requests = [(LOOP * 4, params)]
    model = make()
    plain, _ = answer(model, 0, requests, reproducible=False)
    guessed, stats = answer(model, 7, requests, reproducible=False)
    assert stats["accepted_tokens"] > 0
    assert guessed[0].token_ids == plain[0].token_ids
    for one, other in zip(guessed[0].logprobs, plain[0].logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@needs_kernel
def test_many_tasks_and_forms_are_not_guessed(model):
    params = SamplingParams(temperature=0, max_tokens=20)
    _, stats = answer(model, 7, [(LOOP * 4 + [n], params) for n in range(8)])
    assert stats["draft_tokens"] == 0
