"""Structured output on a random model, which says nothing sensible unless it is made to.

What comes out is judged by Python's own json, re and jsonschema, which know nothing of the masks.
"""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import psutil
import pytest
import torch

from astrai_core.generation import FinishReason, SamplingParams, Structure
from astrai_core.model import ModelConfig, Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.engine import LLM, EngineConfig, InferenceEngine, RefusedError
from astrai_serve.engine.structured import GrammarCompiler
from astrai_serve.engine.task import GenerationFailedError

TEXTS = ["你好，世界！今天北京天气很好。", '{"name": "hello world", "age": 12}']
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "城市": {"enum": ["北京", "上海", "São Paulo"]},
        "温度": {"type": "integer", "minimum": -40, "maximum": 50},
        "tags": {"type": "array", "items": {"enum": ["晴", "rain"]}, "maxItems": 2},
    },
    "required": ["城市", "温度", "tags"],
    "additionalProperties": False,
}
CITY = Structure.of_json(SCHEMA)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.train(TEXTS * 20, 290)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    shape = ModelConfig(
        # more rows than tokens, as models of other people have
        vocab_size=tokenizer.vocab_size + 21,
        dim=32,
        n_layers=1,
        dim_ffn=48,
        n_heads=4,
        max_len=256,
    )
    return Transformer(shape).eval()


@pytest.fixture(scope="module")
def llm(model, tokenizer):
    return LLM(model, tokenizer, EngineConfig(page_size=4, num_pages=128, max_step_tokens=64))


def sampled(structure, seed=0, **params):
    params = {"max_tokens": 150, "temperature": 1.0} | params
    return SamplingParams(structure=structure, seed=seed, **params)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_every_finished_answer_is_what_the_schema_allows(llm, temperature):
    params = [sampled(CITY, seed, temperature=temperature, max_tokens=240) for seed in range(12)]
    answers = llm.generate(["你好"] * 12, params)
    ended = [a for a in answers if a.finish_reason is FinishReason.STOP]
    assert len(ended) >= 6
    for answer in ended:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert len({a.text for a in ended}) > (1 if temperature else 0)


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        (Structure(regex=r"(猫|dog)-[0-9]{2,4}"), r"(猫|dog)-[0-9]{2,4}"),
        (Structure(choice=("是", "no (way)", 'a"\\/\n|b')), r'是|no \(way\)|a"\\/\n\|b'),
        (
            Structure(grammar='start: item ("，" item){0,2}\nitem: "甲" | /[x-z]{2}/'),
            r"(甲|[x-z]{2})(，(甲|[x-z]{2})){0,2}",
        ),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_other_forms_hold_too(llm, structure, pattern):
    for answer in llm.generate(["hello"] * 8, [sampled(structure, seed) for seed in range(8)]):
        assert answer.finish_reason is FinishReason.STOP
        assert re.fullmatch(pattern, answer.text)
        assert not set(answer.token_ids[:-1]) & llm.tokenizer.control_ids


def test_a_json_object_begins_as_one_and_is_never_broken(llm):
    (answer,) = llm.generate(["hello"], sampled(Structure.of_json(), max_tokens=40))
    assert answer.text.startswith("{")
    if answer.finish_reason is FinishReason.STOP:
        assert isinstance(json.loads(answer.text), dict)


def test_a_small_pool_and_other_tasks_change_no_answer(model, tokenizer, llm):
    params = [sampled(CITY, 0), SamplingParams(seed=1, max_tokens=40), sampled(CITY, 2)] * 3
    alone = [llm.generate(["北京天气"], one)[0].text for one in params]
    config = EngineConfig(
        page_size=4, num_pages=64, max_step_tokens=9, max_running_tasks=9, headroom_pages=0
    )
    crowded = LLM(model, tokenizer, config)
    together = crowded.generate(["北京天气"] * len(params), params)
    assert crowded.stats()["num_preemptions"] > 0
    assert [answer.text for answer in together] == alone


def test_least_tokens_and_ignore_eos_put_the_end_off_but_not_beyond_the_form(llm):
    digits = Structure(regex="[0-9]{1,9}")
    for changes in ({"min_tokens": 7}, {"ignore_eos": True}):
        (answer,) = llm.generate(["a"], sampled(digits, **changes))
        assert answer.finish_reason is FinishReason.STOP
        assert re.fullmatch("[0-9]{7,9}", answer.text)
    (short,) = llm.generate(["a"], sampled(Structure(choice=("是",)), min_tokens=90))
    assert (short.text, short.finish_reason) == ("是", FinishReason.STOP)


def test_a_bias_chooses_among_what_the_form_allows(llm):
    liked, wrong = (llm.tokenizer.encode(text)[0] for text in ("7", "x"))
    bias = ((liked, 50.0), (wrong, 100.0))
    (answer,) = llm.generate(["a"], sampled(Structure(regex="[0-9]{5}"), logit_bias=bias))
    assert answer.text == "77777"


def test_prefixes_are_shared_with_and_without_a_form(model, tokenizer):
    llm = LLM(model, tokenizer, EngineConfig(page_size=4, num_pages=128))
    prompt = "北京 hello" * 4
    first, again = (llm.generate([prompt], sampled(CITY))[0].text for _ in range(2))
    assert first == again
    assert llm.stats()["prefix_cache_hits"] > 0


REFUSED = [
    (Structure(json_schema="{"), "json_schema is not valid JSON"),
    (Structure(json_schema='"x"'), "json_schema must be an object"),
    (Structure.of_json({"type": "nope"}), "json_schema cannot be used: Invalid type: nope"),
    (Structure.of_json({"enum": []}), "json_schema cannot be used: Unsatisfiable"),
    (Structure.of_json({"$ref": "http://x.y/z"}), "json_schema cannot be used"),
    (Structure.of_json({"$ref": "#"}), "json_schema cannot be used"),
    (Structure.of_json({"uniqueItems": True, "type": "array"}), "json_schema cannot be used"),
    (Structure(json_schema="[" * 9_000 + "]" * 9_000), "json_schema"),
    (
        Structure(json_schema='{"items":' * 40 + "{}" + "}" * 40),
        "json_schema is nested deeper than 32",
    ),
    (
        Structure.of_json({"properties": {f"p{i}": {"type": "string"} for i in range(5_000)}}),
        "json_schema has .* characters; at most",
    ),
    (
        Structure.of_json(
            {"allOf": [{"type": "string", "pattern": f"^(.*{c}.*){{9}}$"} for c in "abcdefghij"]}
        ),
        "json_schema cannot be used",
    ),
    (Structure(regex="(a"), "regex cannot be used"),
    (Structure(regex="(?=a)b"), "regex cannot be used"),
    (Structure(regex="a" * 20_001), "regex has 20001 characters"),
    (Structure(regex="\ud83d"), "regex holds half a surrogate pair"),
    (Structure(choice=("a",) * 1_001), "choice has 1001 texts"),
    (Structure(grammar="start: nowhere"), "grammar cannot be used"),
]


@pytest.mark.parametrize(("structure", "message"), REFUSED, ids=lambda value: f"{value!s:.60}")
def test_a_hopeless_form_is_refused_soon_and_by_name(llm, structure, message):
    started = time.monotonic()
    with pytest.raises(RefusedError, match=message):
        llm.generate(["hello"], sampled(structure))
    assert time.monotonic() - started < 6


def test_a_compiler_that_takes_too_long_is_not_waited_for(tokenizer, monkeypatch):
    monkeypatch.setattr("astrai_serve.engine.structured.COMPILE_SECONDS", 0.01)
    monkeypatch.setattr(GrammarCompiler, "_work", lambda *_: time.sleep(0.3))
    compiler = GrammarCompiler.of_tokenizer(tokenizer, tokenizer.vocab_size)
    assert compiler is not None
    with pytest.raises(RefusedError, match="regex was not compiled within"):
        compiler.matcher(Structure(regex="a"))
    compiler.close()
    with pytest.raises(RefusedError, match="closed"):
        compiler.matcher(Structure(regex="b"))


HOSTILE = [
    Structure.of_json({"type": "integer", "multipleOf": 9_999_991}),
    Structure.of_json({"type": "array", "items": {"type": "integer", "multipleOf": 7_777_777}}),
    Structure(regex="(.*a){300}(.*b){300}"),
    Structure(regex="(a|b)*a(a|b){4000}"),
    Structure(regex="(([a-z]{1,500}){1,500}){1,500}"),
    Structure(grammar='start: e\ne: e e | "a" | e "+" e | ""\n'),
]


@pytest.mark.parametrize("form", HOSTILE, ids=lambda form: f"{form!s:.70}")
def test_a_hostile_form_stalls_neither_the_engine_nor_other_forms(
    model, tokenizer, monkeypatch, form
):
    """Answers go on while it is compiled and followed, and the next form is served."""
    monkeypatch.setattr("astrai_serve.engine.structured.TRIAL_SECONDS", 1.5)
    monkeypatch.setattr("astrai_serve.engine.structured.COMPILE_SECONDS", 30.0)
    engine = InferenceEngine(model, tokenizer, EngineConfig(page_size=4, num_pages=128))
    other = Structure(choice=("是",))
    engine.generate([[1]], sampled(other))  # the vocabulary is known
    before = psutil.Process().memory_info().rss
    gaps, last = [], time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.generate, [[1]], sampled(form, max_tokens=40))
        while not asked.done() or len(gaps) < 3:
            engine.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))
            gaps.append(time.monotonic() - last)
            last += gaps[-1]
        error = asked.exception()
    assert error is None or isinstance(error, RefusedError | GenerationFailedError)
    # far below the time that such a form takes, and above what a busy machine does to any step
    assert max(gaps) < 1.2, "the engine stood still"
    assert engine.generate([[1]], sampled(Structure(choice=("甲",))))[0].text == "甲"
    assert psutil.Process().memory_info().rss - before < 300e6
    assert engine.healthy
    engine.close()


def test_a_form_that_took_too_long_is_refused_at_once_the_next_time(tokenizer, monkeypatch):
    monkeypatch.setattr("astrai_serve.engine.structured.TRIAL_SECONDS", 1.5)
    monkeypatch.setattr("astrai_serve.engine.structured.COMPILE_SECONDS", 30.0)
    compiler = GrammarCompiler.of_tokenizer(tokenizer, tokenizer.vocab_size)
    assert compiler is not None
    with pytest.raises(RefusedError, match="json_schema was not compiled within"):
        compiler.matcher(HOSTILE[0])
    compiler.matcher(Structure(regex="a"))  # the worker is free again
    started = time.monotonic()
    with pytest.raises(RefusedError, match="json_schema was not compiled within"):
        compiler.matcher(HOSTILE[0])
    assert time.monotonic() - started < 0.5
    (process,) = compiler._trial._processes
    compiler.close()
    assert process.returncode is not None, "the trial's process outlives its engine"


def test_the_vocabulary_is_sorted_before_the_first_form_comes(tokenizer, monkeypatch):
    compiler = GrammarCompiler.of_tokenizer(tokenizer, tokenizer.vocab_size)
    assert compiler is not None
    made = []
    build = compiler._shared_tokenizer
    monkeypatch.setattr(
        compiler, "_shared_tokenizer", lambda: made.append(threading.current_thread()) or build()
    )
    compiler.warm_up()
    compiler._worker.submit(int).result(10)  # behind it
    assert compiler._tokenizer is not None
    assert made == [thread for thread in made if thread.name.startswith("astrai-grammar")] != []
    compiler.close()


def test_equal_forms_are_compiled_once_and_the_oldest_forgotten(tokenizer, monkeypatch):
    monkeypatch.setattr("astrai_serve.engine.structured.NUM_KEPT", 2)
    compiler = GrammarCompiler.of_tokenizer(tokenizer, tokenizer.vocab_size)
    assert compiler is not None
    made = []
    compile_one = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda s: made.append(s.regex) or compile_one(s))
    for regex in ("a", "a", "b", "a", "c", "b"):
        compiler.matcher(Structure(regex=regex))
    assert made == ["a", "b", "c", "b"]


def test_a_matcher_that_fails_ends_its_own_task_only(llm, monkeypatch):
    import astrai_serve.engine.structured as structured

    write_mask = structured.Matcher.write_mask
    monkeypatch.setattr(
        structured.Matcher,
        "write_mask",
        lambda self, bits: write_mask(self, bits) if self.end_ids else 1 / 0,
    )
    core = llm._core
    tasks = [core.new_task(10_000 + n, [5, 6], sampled(CITY, n)) for n in range(2)]
    tasks[0].matcher.end_ids = frozenset()
    for task in tasks:
        core.add(task)
    ends = {}
    while core.has_tasks:
        ends |= {task_id: event.finish for task_id, event in core.step() if event.finish}
    assert ends[10_000].reason is FinishReason.ERROR
    assert "ZeroDivisionError" in ends[10_000].message
    assert ends[10_001].reason is not FinishReason.ERROR
    core.check_invariants()


def test_a_model_that_prefers_a_wrong_token_to_a_matcher_fails_clearly(llm):
    matcher = llm._core.matcher_of(sampled(CITY))
    with pytest.raises(RuntimeError, match="the structure cannot be followed"):
        matcher.advance(llm.tokenizer.encode("x")[0])
    # what failed is compiled anew, and works
    assert llm.generate(["a"], sampled(Structure(choice=("b",))))[0].text == "b"


def test_without_text_there_is_no_form(model):
    with pytest.raises(RefusedError, match="structure needs a tokenizer"):
        LLM(model).generate([[1]], sampled(CITY))


def test_the_threaded_engine_compiles_beside_its_thread(model, tokenizer):
    engine = InferenceEngine(model, tokenizer, EngineConfig(page_size=4, num_pages=128))
    with pytest.raises(RefusedError, match="regex cannot be used"):
        engine.submit([1], sampled(Structure(regex="(")))
    answers = engine.generate([[1], [2]], sampled(Structure(choice=("甲", "乙"))))
    assert {answer.text for answer in answers} <= {"甲", "乙"}
    engine.close()


def test_an_error_tells_a_blocking_caller(llm, monkeypatch):
    monkeypatch.setattr("astrai_serve.engine.structured.Matcher.write_mask", lambda *_: 1 / 0)
    with pytest.raises(GenerationFailedError, match="ZeroDivisionError"):
        llm.generate(["a"], sampled(CITY))
