"""Forms that must be kept, of a random model: whatever it would rather say, the grammar decides."""

import json
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["北京", "上海"]}, "n": {"enum": [1, 22, 333]}},
    "required": ["city", "n"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "weather", "parameters": SCHEMA}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
OTHER: Any = {"name": "other", "parameters": NOTHING}
HI: Any = [{"role": "user", "content": "今天天气"}]
SEEDS = range(3)


@pytest.fixture(scope="module")
def openai_client(tiny_url):
    with openai.OpenAI(base_url=f"{tiny_url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic_client(tiny_url):
    with anthropic.Anthropic(base_url=tiny_url, api_key="any", max_retries=0) as client:
        yield client


def chat(client, **body):
    """Answers that ended by themselves."""
    body = {"max_tokens": 200, "n": len(SEEDS), "seed": 1, "parallel_tool_calls": False} | body
    if not body.get("tools"):
        del body["parallel_tool_calls"]
    choices = client.chat.completions.create(model="tiny", messages=HI, **body).choices
    assert all(one.finish_reason != "length" for one in choices)
    return [one.message for one in choices]


def tools(*functions, **more):
    return [{"type": "function", "function": {**one, **more}} for one in functions]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "other"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        ({"type": "function", "function": {"name": "other"}}, {"other"}),
    ],
    ids=["required", "weather", "other"],
)
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_choice_of_openais_is_a_valid_call(openai_client, choice, names, strict):
    schemas = {"weather": SCHEMA, "other": NOTHING}
    for said in chat(openai_client, tools=tools(WEATHER, OTHER, strict=strict), tool_choice=choice):
        (call,) = said.tool_calls
        assert call.function.name in names
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


@pytest.mark.parametrize("stream", [False, True])
def test_response_format_is_valid_json(openai_client, stream):
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    if not stream:
        for said in chat(openai_client, response_format=form):
            jsonschema.validate(json.loads(said.content), SCHEMA)
        return
    chunks = openai_client.chat.completions.create(
        model="tiny", messages=HI, response_format=form, seed=1, max_tokens=200, stream=True
    )
    text = "".join(one.delta.content or "" for chunk in chunks for one in chunk.choices)
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    "body",
    [
        {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        {"tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}},
    ],
    ids=["any", "tool"],
)
def test_a_choice_of_anthropics_is_a_valid_call(anthropic_client, body):
    offered: Any = [{"name": "weather", "input_schema": SCHEMA}]
    ended = 0
    for n in SEEDS:
        message = anthropic_client.messages.create(
            model="tiny", max_tokens=200, messages=[ask(n)], tools=offered, **body
        )
        if message.stop_reason == "max_tokens":
            continue
        ended += 1
        (block,) = message.content
        assert (block.type, block.name, message.stop_reason) == ("tool_use", "weather", "tool_use")
        jsonschema.validate(block.input, SCHEMA)
    assert ended


def test_output_config_is_valid_json(anthropic_client):
    form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    ended = 0
    for n in SEEDS:
        message = anthropic_client.messages.create(
            model="tiny", max_tokens=200, messages=[ask(n)], output_config=form
        )
        if message.stop_reason == "end_turn":
            ended += 1
            jsonschema.validate(json.loads(message.content[0].text), SCHEMA)
    assert ended


def ask(n) -> Any:
    return {"role": "user", "content": f"今天天气 {n}"}
