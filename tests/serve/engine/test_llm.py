"""`LLM` as its users call it, and `InferenceEngine` beside it, on a small model."""

import dataclasses
import gc
import json
import math
import weakref

import pytest
import torch

from astrai_core.generation import FinishReason, SamplingParams
from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.model.fusion import fuse_
from astrai_core.model.packed import why_not_packed
from astrai_core.model.quantization import quantize_
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.engine import (
    LLM,
    EngineClosedError,
    EngineConfig,
    EngineError,
    InferenceEngine,
    RefusedError,
)
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.kv_storage import KVStorage
from astrai_serve.engine.sampling import counter_uniform
from astrai_serve.engine.task import GenerationFailedError

CONFIG = EngineConfig(page_size=4, num_pages=64, max_step_tokens=64)
TEXTS = ["你好，世界！今天天气很好。", "hello world, the weather is fine today"]
PROMPTS = [[5, 9, 3], [7] * 11, [1, 2, 3, 4, 5, 6, 7, 8], [250]]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.train(TEXTS * 20, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=32, n_layers=1, dim_ffn=48, n_heads=4, max_len=64
    )
    model = Transformer(shape).eval()
    for parameter in model.parameters():
        parameter.data *= 6 if parameter.dim() > 1 else 1
    return model


@pytest.mark.skipif(why_not_packed() is not None, reason=str(why_not_packed()))
def test_steps_of_our_operators_have_one_pool_of_threads_and_torch_has_its_own_back():
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=40, dim=32, n_layers=1, dim_ffn=48, n_heads=4, max_len=64)
    model = Transformer(shape).eval()
    quantize_(model, "w8a8")
    fuse_(model)
    of_torch, seen = torch.get_num_threads(), []
    llm = LLM(model, config=dataclasses.replace(CONFIG, num_threads=2))
    core = llm._open_core()
    step = core.step

    def watched():
        ours = torch.ops.astrai_packed.use_threads(0)
        torch.ops.astrai_packed.use_threads(ours)
        seen.append((ours, torch.get_num_threads()))
        return step()

    core.step = watched
    before = torch.ops.astrai_packed.use_threads(3)
    llm.generate([[1, 2]], SamplingParams(max_tokens=2))
    assert set(seen) == {(2, 1)}
    assert torch.get_num_threads() == of_torch
    assert torch.ops.astrai_packed.use_threads(before) == 3


@pytest.fixture
def llm(model, tokenizer):
    return LLM(model, tokenizer, CONFIG)


@pytest.fixture
def engine(model, tokenizer):
    engine = InferenceEngine(model, tokenizer, CONFIG)
    yield engine
    engine.close()


def core_of(llm) -> EngineCore:
    return llm._core


def by_hand(model, prompt, params, sample_index=0):
    """What is said after a prompt: the full forward, and one number that decides each draw."""
    ids = list(prompt)
    for _ in range(params.max_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))["logits"][0, -1].double()
        if params.temperature == 0:
            ids.append(int(logits.argmax()))
            continue
        below = (logits / params.temperature).softmax(0).cumsum(0)
        ids.append(int((below <= counter_uniform(params.seed, sample_index, len(ids))).sum()))
    return tuple(ids[len(prompt) :])


def logprobs_by_hand(model, prompt, token_ids):
    with torch.no_grad():
        rows = model(torch.tensor([[*prompt, *token_ids]]))["logits"][0].log_softmax(-1)
    places = range(len(prompt) - 1, len(rows) - 1)
    return [rows[place, i].item() for place, i in zip(places, token_ids, strict=True)]


def draws(seed: int | None = 1, **more):
    return SamplingParams(**{"max_tokens": 12, "seed": seed, "ignore_eos": True} | more)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_answer_is_that_of_the_full_forward(llm, model, temperature):
    params = [draws(seed, temperature=temperature) for seed in range(len(PROMPTS))]
    completions = llm.generate(PROMPTS, params)
    for prompt, one, completion in zip(PROMPTS, params, completions, strict=True):
        assert completion.token_ids == by_hand(model, prompt, one)
        assert completion.finish_reason is FinishReason.LENGTH
        wanted = logprobs_by_hand(model, prompt, completion.token_ids)
        assert completion.logprobs == pytest.approx(wanted, abs=1e-4)


def test_a_seed_says_the_same_alone_and_in_a_batch(llm):
    params = [draws(seed) for seed in range(len(PROMPTS))]
    together = llm.generate(PROMPTS, params)
    alone = [llm.generate([p], one)[0] for p, one in zip(PROMPTS, params, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    again = llm.generate(PROMPTS[::-1], params[::-1])[::-1]
    assert [c.token_ids for c in again] == [c.token_ids for c in alone]


def test_other_seeds_say_something_else_and_no_seed_is_a_fresh_one(llm):
    fixed = llm.generate([PROMPTS[0]] * 5, [draws(seed) for seed in range(5)])
    fresh = llm.generate([PROMPTS[0]] * 5, draws(None))
    assert len({completion.token_ids for completion in fixed + fresh}) == 10


def test_samples_of_one_request_differ_and_are_reproducible(engine, model):
    def say(sample_index):
        stream = engine.submit(PROMPTS[0], draws(), sample_index=sample_index)
        return tuple(i for event in stream for i in event.token_ids)

    samples = [say(index) for index in range(4)]
    assert len(set(samples)) == 4
    assert samples == [by_hand(model, PROMPTS[0], draws(), index) for index in range(4)]


def test_the_engine_says_what_the_llm_says(engine, llm):
    params = [draws(seed, logprobs=2) for seed in range(len(PROMPTS))]
    for one, other in zip(
        engine.generate(PROMPTS, params), llm.generate(PROMPTS, params), strict=True
    ):
        assert (one.token_ids, one.text) == (other.token_ids, other.text)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def words(completions):
    """What was said; the log-probabilities beside it differ by rounding from batch to batch."""
    return [(c.token_ids, c.text, c.finish_reason) for c in completions]


def test_a_text_is_its_tokens_and_the_answer_is_text(llm, tokenizer):
    by_text = llm.generate(["hello 世界", "hello"], draws())
    by_ids = llm.generate([tokenizer.encode("hello 世界"), tokenizer.encode("hello")], draws())
    assert words(by_text) == words(by_ids)
    for completion in by_text:
        spelled = b"".join(map(tokenizer.token_bytes, completion.token_ids))
        whole = spelled.decode("utf-8", "replace")
        assert whole.startswith(completion.text)
        assert len(whole) - len(completion.text) <= 1, "half a character at the end is left out"


def test_a_chat_is_its_template(llm, tokenizer):
    rendered = tokenizer.encode_rendered(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    said = llm.chat([{"role": "user", "content": "hello"}], draws())
    assert words([said]) == words(llm.generate([rendered], draws()))


def always(token_id):
    """The model says nothing else."""
    return ((token_id, 1000.0),)


def test_the_end_of_turn_ends_the_answer(llm, tokenizer):
    params = SamplingParams(max_tokens=9, logit_bias=always(tokenizer.eos_id))
    (completion,) = llm.generate([[5]], params)
    assert completion.token_ids == (tokenizer.eos_id,)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.text == ""


def test_ignore_eos_goes_on_to_the_limit(llm, tokenizer):
    params = draws(logit_bias=always(tokenizer.eos_id), max_tokens=5)
    (completion,) = llm.generate([[5]], params)
    assert completion.token_ids == (tokenizer.eos_id,) * 5
    assert completion.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("temperature", [0, 1])
def test_min_tokens_forbids_every_stop_token_until_then(llm, tokenizer, temperature):
    bias = ((tokenizer.eos_id, 1000.0), (77, 900.0))
    params = SamplingParams(
        max_tokens=9, min_tokens=3, logit_bias=bias, stop_token_ids=(77,), temperature=temperature
    )
    (completion,) = llm.generate([[5]], params)
    assert completion.token_ids[3:] == (tokenizer.eos_id,)
    assert not {tokenizer.eos_id, 77} & set(completion.token_ids[:3])


def test_without_a_limit_the_context_is_the_limit(llm, model):
    (completion,) = llm.generate([[5] * 20], SamplingParams(ignore_eos=True))
    assert len(completion.token_ids) == model.config.max_len - 20
    assert completion.finish_reason is FinishReason.LENGTH


def test_a_folder_is_a_model_and_its_tokenizer(tmp_path, model, tokenizer, llm):
    AutoModel.save_pretrained(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = LLM(tmp_path / "model", config=CONFIG)
    assert words(loaded.generate(["hello"], draws())) == words(llm.generate(["hello"], draws()))


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    AutoModel.save_pretrained(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    wishes = {"temperature": 1.7, "top_k": 9, "repetition_penalty": 1.2, "max_new_tokens": 8}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(wishes))
    return tmp_path / "model"


def test_a_call_without_parameters_takes_those_of_the_folder(folder, tokenizer, monkeypatch):
    llm = LLM(folder, config=CONFIG)
    wanted = SamplingParams(temperature=1.7, top_k=9, repetition_penalty=1.2, max_tokens=8)
    assert llm.default_params == wanted
    asked = []
    new_task = core_of(llm).new_task
    monkeypatch.setattr(
        core_of(llm), "new_task", lambda i, ids, one: asked.append(one) or new_task(i, ids, one)
    )
    llm.generate([tokenizer.encode("hello"), [5] * 60])
    llm.chat([{"role": "user", "content": "hello"}])
    limits = [one.max_tokens for one in asked]
    assert limits == [8, 4, 8], "a limit that nobody chose gives way to the context"
    assert {(one.temperature, one.top_k, one.repetition_penalty) for one in asked} == {
        (1.7, 9, 1.2)
    }
    llm.generate(["hello"], SamplingParams(max_tokens=2))
    assert asked[-1] == SamplingParams(max_tokens=2, logprobs=0), "given ones are taken as they are"
    with pytest.raises(RefusedError, match="a prompt is a sequence of token ids, not 5"):
        llm.generate([5])  # pyright: ignore[reportArgumentType]


def test_a_folder_that_wants_what_is_not_done_is_refused(folder):
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    with pytest.raises(ValueError, match="num_beams 4 is not supported"):
        LLM(folder)


def test_ids_alone_need_no_tokenizer(model, llm):
    bare = LLM(model, config=CONFIG)
    (completion,) = bare.generate([[5, 6]], draws())
    assert completion.token_ids == llm.generate([[5, 6]], draws())[0].token_ids
    assert completion.text == ""
    with pytest.raises(RefusedError, match="a text prompt needs a tokenizer"):
        bare.generate(["hello"])
    with pytest.raises(RefusedError, match="chat needs a tokenizer"):
        bare.chat([{"role": "user", "content": "hello"}])
    with pytest.raises(RefusedError, match="stop strings need a tokenizer"):
        bare.generate([[5]], SamplingParams(stop=("a",)))


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("hello", None, r"prompts is a list, not one text; pass \[text\]"),
        ([5, 6], None, "a prompt is a sequence of token ids, not 5"),
        ([[5, 1.5]], None, r"a prompt is a sequence of token ids, not \[5, 1.5\]"),
        ([[5, 9999]], None, "prompt has token id 9999, but the vocabulary ends at"),
        ([[-1]], None, "prompt has token id -1"),
        ([[]], None, "the prompt is empty"),
        ([""], None, "the prompt is empty"),
        ([[5] * 64], None, "64 tokens and leaves no room.*context of 64"),
        ([[5]], SamplingParams(max_tokens=64), "lower max_tokens to 63"),
        ([[5]], SamplingParams(stop_token_ids=(9999,)), "stop_token_ids has token id 9999"),
        ([[5]], SamplingParams(logit_bias=((9999, 1.0),)), "logit_bias has token id 9999"),
        ([[5], [6]], [SamplingParams()], "1 params for 2 prompts; pass one, or one each"),
    ],
)
def test_what_can_never_run_is_refused_at_once(llm, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)
    assert not core_of(llm).has_tasks
    assert llm.generate([[5]], draws(max_tokens=1))


def test_one_bad_prompt_keeps_the_good_ones_from_being_computed(llm):
    with pytest.raises(RefusedError, match="empty"):
        llm.generate([[5], []])
    assert core_of(llm).stats()["num_steps"] == 0


def test_the_engine_takes_token_ids_only(engine):
    for prompts in ("hello", ["hello"], [[5, "a"]], [None]):
        with pytest.raises(RefusedError, match="a prompt is a sequence of token ids"):
            engine.generate(prompts, SamplingParams())
    assert engine.healthy


def test_tokens_of_arrays_and_tensors_are_numbers_too(llm):
    ids = torch.tensor([5, 9, 3])
    penalised = draws(repetition_penalty=1.5)
    assert words(llm.generate([ids], penalised)) == words(llm.generate([[5, 9, 3]], penalised))


def test_nothing_asked_is_nothing_said(llm, engine):
    assert llm.generate([]) == engine.generate([], SamplingParams()) == []


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_logit_that_is_no_number_ends_its_own_task(model, tokenizer, broken, temperature):
    own = Transformer(model.config).eval()
    own.load_state_dict(model.state_dict())
    llm = LLM(own, tokenizer, CONFIG)
    wanted = llm.generate([[5, 9]], draws(temperature=temperature))

    def spoil(module, arguments, output):
        row = (arguments[0] == 250).nonzero()[:, 0]
        if len(row):
            output["logits"][-1, 3] = broken  # the last task's, of one token among 300

    own.register_forward_hook(spoil)
    tasks = [[5, 9], [8, 8, 8, 8, 250]]
    with pytest.raises(GenerationFailedError, match=r"FloatingPointError: .+ not finite"):
        llm.generate(tasks, draws(temperature=temperature))
    assert core_of(llm).num_finished[FinishReason.ERROR] == 1
    assert core_of(llm).stats()["num_cached_pages"] == 3, "only of the task that went well"
    assert words(llm.generate([[5, 9]], draws(temperature=temperature))) == words(wanted)


def test_changed_weights_are_seen(model, tokenizer):
    own = Transformer(model.config).eval()
    own.load_state_dict(model.state_dict())
    llm, prompt = LLM(own, tokenizer, CONFIG), list(range(20, 40))
    llm.generate([prompt], draws())
    own.get_parameter("layers.0.self_attn.v_proj.weight").data.neg_()  # so cached values change
    llm.update_weights()
    (completion,) = llm.generate([prompt], draws())
    wanted = logprobs_by_hand(own, prompt, completion.token_ids)
    assert completion.logprobs == pytest.approx(wanted, abs=1e-4)


def test_an_error_or_ctrl_c_leaves_nothing_behind(llm, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(core_of(llm).executor, "execute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, draws())
    core_of(llm).check_idle()
    assert llm.generate([[5]], draws())


@pytest.mark.parametrize("make", [LLM, InferenceEngine])
def test_closing_frees_the_keys_and_values(make, model, tokenizer):
    held = make(model, tokenizer, CONFIG)
    held.generate([[5]], draws())
    storage: weakref.ref[KVStorage] = weakref.ref(held._core.executor.storage)
    gc.collect()
    assert storage() is not None
    held.close()
    gc.collect()
    assert storage() is None
    with pytest.raises(EngineClosedError, match="closed"):
        held.generate([[5]], draws())
    with pytest.raises(EngineClosedError, match="closed"):
        held.update_weights()
    held.close()


def test_a_closed_engine_still_tells_its_counts(engine):
    engine.generate([[5, 6]], draws(max_tokens=3))
    engine.close()
    assert engine.stats()["generation_tokens"] == 3
    assert engine.max_context == 64
    assert not engine.healthy


def test_our_errors_form_one_tree():
    for error in (RefusedError, EngineClosedError, GenerationFailedError):
        assert issubclass(error, EngineError)
    assert issubclass(RefusedError, ValueError)


@pytest.mark.parametrize("kind", ["llm", "engine"])
def test_a_caller_can_end_a_call_between_steps(kind, request):
    """A trainer that is told to stop does not wait for a long rollout."""
    generator = request.getfixturevalue(kind)
    wanted = generator.generate(PROMPTS, SamplingParams(max_tokens=12, temperature=0))
    calls = 0

    def stop_at_the_third():
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    params = SamplingParams(max_tokens=12, temperature=0)
    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPTS, params, stop_at_the_third)
    again = generator.generate(PROMPTS, params, lambda: None)
    assert [one.token_ids for one in again] == [one.token_ids for one in wanted]
    assert generator.stats()["num_steps"] > 12
