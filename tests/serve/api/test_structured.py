"""Forms and log-probabilities of prompts over HTTP: the official client and a real small model."""

import json
import math
from typing import Any

import jsonschema
import openai
import pytest
import torch

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"城市": {"enum": ["北京", "上海"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["城市", "age"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "c", "strict": True, "schema": SCHEMA},
}
BAD_TOOLS: Any = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
]
HI: Any = [{"role": "user", "content": "北京"}]


@pytest.fixture(scope="module")
def client(tiny_url):
    with openai.OpenAI(
        base_url=f"{tiny_url}/v1", api_key="any", max_retries=0, timeout=60
    ) as client:
        yield client


def ask(client, **body):
    body = {"max_tokens": 120, "seed": 3} | body
    return client.chat.completions.create(model="tiny", messages=HI, **body)


def test_what_ends_by_itself_is_valid(client):
    choices = ask(client, n=6, response_format=FORMAT).choices
    ended = [choice for choice in choices if choice.finish_reason == "stop"]
    assert len(ended) >= 3
    for choice in ended:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_a_stream_says_the_same_as_a_whole_answer(client):
    whole = ask(client, response_format=FORMAT, logprobs=True).choices[0]
    pieces = ask(client, response_format=FORMAT, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.message.content
    told = b"".join(bytes(one.bytes) for one in whole.logprobs.content)
    assert told.decode() == whole.message.content


@pytest.mark.parametrize(
    "extra",
    [
        {"structured_outputs": {"choice": ["是", "否"]}},
        {"structured_outputs": {"regex": "是|否"}},
        {"structured_outputs": {"json": {"enum": ["是", "否"]}}},
        {"structured_outputs": {"grammar": 'start: "是" | "否"'}},
        {"guided_choice": ["是", "否"]},
    ],
    ids=str,
)
def test_the_words_of_vllm_are_understood(client, extra):
    content = ask(client, extra_body=extra).choices[0].message.content
    assert content.strip('"') in ("是", "否")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "schema"),
        ({"extra_body": {"guided_regex": "("}}, "regex cannot be used"),
        ({"extra_body": {"guided_choice": []}}, "choice must be made of"),
        ({"extra_body": {"structured_outputs": {}}}, "a structure needs one of"),
        ({"extra_body": {"structured_outputs": {"structural_tag": "x"}}}, "structural_tag"),
        ({"response_format": FORMAT, "extra_body": {"guided_regex": "a"}}, "both say"),
        ({"extra_body": {"prompt_logprobs": 1}, "stream": True}, "cannot be streamed"),
        ({"tools": BAD_TOOLS, "tool_choice": "required"}, "tools: grammar cannot be used"),
        ({"n": 13}, "holds 12 at a time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_had_is_refused_with_the_reason(client, body, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **body)


def expected(model, ids):
    """Log-probability of each token but the first, by the plain forward pass."""
    with torch.no_grad():
        scores = model(torch.tensor([ids]))["logits"][0].log_softmax(-1)
    return [scores[n - 1, token].item() for n, token in enumerate(ids) if n]


def test_an_echoed_prompt_has_the_log_probabilities_of_the_plain_forward_pass(
    client, tiny_model, tiny_tokenizer
):
    ids = tiny_tokenizer.encode("今天北京天气很好。hello world")
    for _ in range(2):  # the second time its pages are cached
        answer = client.completions.create(
            model="tiny", prompt=[ids], max_tokens=1, logprobs=1, echo=True, temperature=0
        ).choices[0]
        logprobs = answer.logprobs
        assert logprobs.token_logprobs[0] is None
        assert logprobs.top_logprobs[0] is None
        assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(
            expected(tiny_model, ids), abs=1e-4
        )
        assert len(logprobs.tokens) == len(logprobs.text_offset) == len(ids) + 1
        tops = zip(logprobs.tokens[1:], logprobs.top_logprobs[1:], strict=True)
        assert all(token in top for token, top in tops)
        assert answer.text.startswith("今天北京天气很好。hello world")


def test_echo_alone_repeats_the_prompt(client):
    body: Any = {"model": "tiny", "prompt": "你好", "max_tokens": 4, "seed": 1, "echo": True}
    whole = client.completions.create(**body).choices[0].text
    pieces = client.completions.create(**body, stream=True)
    assert whole.startswith("你好")
    assert "".join(piece.choices[0].text for piece in pieces) == whole


def test_a_chat_tells_of_its_prompt_in_the_words_of_vllm(client, tiny_model, tiny_tokenizer):
    choice = ask(client, max_tokens=1, extra_body={"prompt_logprobs": 2}).choices[0]
    ids = tiny_tokenizer.apply_chat_template(HI, add_generation_prompt=True)
    told = choice.model_extra["prompt_logprobs"]
    assert told[0] is None
    values = [entry[str(i)]["logprob"] for i, entry in zip(ids[1:], told[1:], strict=True)]
    assert values == pytest.approx(expected(tiny_model, ids), abs=1e-4)
    assert all(math.isfinite(value) for value in values)


WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NOW: Any = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": WEATHER["function"]}]
)
def test_a_forced_tool_is_called_by_its_schema_whatever_the_model_wants(client, choice):
    """The model is random: only the grammar can have made it call anything."""
    name = {"name": "weather"} if isinstance(choice, dict) else None
    choice = {"type": "function", "function": name} if name else choice
    more = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    choices = ask(client, n=4, **more).choices
    whole = [one for one in choices if one.finish_reason == "tool_calls"]
    assert len(whole) >= 2
    for one in whole:
        (call,) = one.message.tool_calls
        assert (call.function.name, one.message.content) == ("weather", None)
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    assert all(one.finish_reason == "length" for one in choices if one not in whole)


def test_a_streamed_call_joins_to_the_whole_one(client):
    more = {"tools": [WEATHER, NOW], "tool_choice": "required", "parallel_tool_calls": False}
    whole = ask(client, **more).choices[0]
    pieces = [chunk.choices[0] for chunk in ask(client, stream=True, **more)]
    calls = [call for piece in pieces for call in piece.delta.tool_calls or []]
    assert {call.index for call in calls} == {0}
    assert [bool(call.id) for call in calls] == [True] + [False] * (len(calls) - 1)
    arguments = "".join(call.function.arguments for call in calls)
    assert arguments == whole.message.tool_calls[0].function.arguments
    assert calls[0].function.name == whole.message.tool_calls[0].function.name
    assert pieces[-1].finish_reason == whole.finish_reason


def test_thoughts_that_the_prompt_opened_come_before_the_form(client):
    more = {"response_format": FORMAT, "reasoning_effort": "low"}
    message = ask(client, **more).choices[0].message
    assert message.content == ""  # a random model never closes its thoughts
    assert len(message.reasoning_content) > 20
