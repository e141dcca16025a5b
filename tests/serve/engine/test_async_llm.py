"""`AsyncLLM` as a program on an event loop calls it, beside `LLM` on the same small model."""

import asyncio
import json

import pytest
import torch

from astrai_core.generation import FinishReason, SamplingParams, Structure
from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.engine import LLM, AsyncLLM, EngineClosedError, EngineConfig, RefusedError
from astrai_serve.engine.task import GenerationFailedError

CONFIG = EngineConfig(page_size=4, num_pages=64, max_step_tokens=64)
PROMPTS = [[5, 9, 3], [7] * 11, [1, 2, 3, 4, 5, 6, 7, 8], [250]]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.train(["你好，世界！", "hello world, the weather is fine"] * 20, 300)


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


@pytest.fixture
def llm(model, tokenizer):
    llm = AsyncLLM(model, tokenizer, CONFIG)
    yield llm
    llm.close()


def draws(seed=1, **more):
    return SamplingParams(**{"max_tokens": 12, "seed": seed, "ignore_eos": True} | more)


def words(completions):
    return [(c.token_ids, c.text, c.finish_reason) for c in completions]


async def idle(llm):
    while llm.engine.num_open or llm.engine.stats()["num_running"]:
        await asyncio.sleep(0.005)


def test_calls_at_once_share_the_engine_and_say_what_each_says_alone(llm, model, tokenizer):
    async def many():
        return await asyncio.gather(
            *(llm.generate([prompt, prompt[:1]], draws(n)) for n, prompt in enumerate(PROMPTS)),
            llm.generate(["hello", "世界"], [draws(7), draws(8, temperature=0)]),
        )

    *by_ids, by_text = asyncio.run(many())
    alone = LLM(model, tokenizer, CONFIG)
    for n, (prompt, said) in enumerate(zip(PROMPTS, by_ids, strict=True)):
        assert words(said) == words(alone.generate([prompt, prompt[:1]], draws(n)))
    wanted = alone.generate(["hello", "世界"], [draws(7), draws(8, temperature=0)])
    assert words(by_text) == words(wanted)
    assert llm.engine.stats()["num_steps"] < 5 * 12, "each call did not wait for the others"


def test_a_stream_is_the_answer_in_pieces_and_a_chat_is_its_template(llm, model, tokenizer):
    messages = [{"role": "user", "content": "hello"}]

    async def ask():
        events = [event async for event in llm.stream("hello", draws())]
        return events, await llm.chat(messages, draws())

    events, said = asyncio.run(ask())
    alone = LLM(model, tokenizer, CONFIG)
    (wanted,) = alone.generate(["hello"], draws())
    assert tuple(i for event in events for i in event.token_ids) == wanted.token_ids
    assert "".join(event.text for event in events) == wanted.text
    assert [event.finish is not None for event in events].count(True) == 1
    assert words([said]) == words([alone.chat(messages, draws())])


def test_a_call_that_is_cancelled_takes_its_tasks_along_and_no_others(llm):
    long = draws(max_tokens=50)

    async def leave():
        call = asyncio.create_task(llm.generate([[5], [6], [7]], long))
        stays = asyncio.create_task(llm.generate([[8]], long))
        while not llm.engine.stats()["generation_tokens"]:
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return await stays

    (kept,) = asyncio.run(leave())
    assert len(kept.token_ids) == 50
    asyncio.run(idle(llm))
    stats = llm.engine.stats()
    assert (stats["num_finished_cancelled"], stats["num_finished_length"]) == (3, 1)
    assert stats["kv_cache_usage"] == 0


def test_leaving_the_loop_of_a_stream_ends_its_task(llm):
    async def leave():
        stream = llm.stream([5], draws(max_tokens=60))
        async for _ in stream:
            break
        await stream.aclose()
        await idle(llm)

    asyncio.run(leave())
    assert llm.engine.stats()["num_finished_cancelled"] == 1


def test_an_error_reaches_its_own_caller_only(llm, monkeypatch):
    core = llm.engine._core
    say = core._say

    def fail(task, sample):
        if task.prompt_ids[0] == 13:
            raise ArithmeticError("thirteen")
        return say(task, sample)

    monkeypatch.setattr(core, "_say", fail)

    async def both():
        return await asyncio.gather(
            llm.generate([[5], [13]], draws()), llm.generate([[5]], draws()),
            return_exceptions=True,
        )  # fmt: skip

    broken, whole = asyncio.run(both())
    assert isinstance(broken, GenerationFailedError)
    assert "ArithmeticError: thirteen" in str(broken)
    assert len(whole[0].token_ids) == 12
    assert llm.engine.healthy


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("hello", None, r"prompts is a list, not one text; pass \[text\]"),
        ([[5], []], None, "the prompt is empty"),
        ([[5]], SamplingParams(max_tokens=64), "lower max_tokens to 63"),
        ([[5], [6]], [SamplingParams()], "1 params for 2 prompts"),
        ([[5]], SamplingParams(structure=Structure(regex="(")), "regex cannot be used"),
    ],
)
def test_what_can_never_run_is_refused(llm, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        asyncio.run(llm.generate(prompts, params))
    asyncio.run(idle(llm))
    assert llm.engine.healthy


def test_closing_ends_the_calls_that_wait(model, tokenizer):
    async def close_in_the_middle():
        async with AsyncLLM(model, tokenizer, CONFIG) as llm:
            calls = [
                asyncio.create_task(llm.generate([[n]], draws(max_tokens=60))) for n in range(9)
            ]
            while not llm.engine.stats()["generation_tokens"]:
                await asyncio.sleep(0.001)
        return llm, await asyncio.gather(*calls, return_exceptions=True)

    llm, results = asyncio.run(close_in_the_middle())
    failed = [one for one in results if isinstance(one, GenerationFailedError)]
    assert failed, "the engine was closed before it could finish"
    assert all("closed" in str(one) for one in failed)
    with pytest.raises(EngineClosedError, match="closed"):
        asyncio.run(llm.generate([[5]]))


def test_ids_alone_need_no_tokenizer(model):
    async def ask():
        async with AsyncLLM(model, config=CONFIG) as llm:
            (said,) = await llm.generate([[5, 6]], draws())
            with pytest.raises(RefusedError, match="a text prompt needs a tokenizer"):
                await llm.generate(["hello"])
            with pytest.raises(RefusedError, match="chat needs a tokenizer"):
                await llm.chat([{"role": "user", "content": "hello"}])
            return said

    assert asyncio.run(ask()).finish_reason is FinishReason.LENGTH


def test_a_folder_says_how_to_sample(tmp_path, model, tokenizer):
    AutoModel.save_pretrained(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    wishes = {"do_sample": False, "max_new_tokens": 3}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(wishes))

    async def ask():
        async with AsyncLLM(tmp_path / "model", config=CONFIG) as llm:
            said = await llm.generate([[5], [7] * 62])
            events = [event async for event in llm.stream([5])]
            return said, tuple(i for event in events for i in event.token_ids)

    said, streamed = asyncio.run(ask())
    greedy = SamplingParams(temperature=0, max_tokens=3)
    (wanted,) = LLM(model, tokenizer, CONFIG).generate([[5]], greedy)
    assert said[0].token_ids == streamed == wanted.token_ids
    assert len(said[1].token_ids) <= 2
