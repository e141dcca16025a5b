"""The official client's `responses`, against a server on a socket."""

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

ANSWER = (
    "<think>\nhm\n</think>\n\nLet me see.\n"
    '<tool_call>\n{"name": "f", "arguments": {"city": "北京"}}\n</tool_call>'
)
TOOLS: Any = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
TEXT_EVENTS = ["output_item.added", "content_part.added", "output_text.delta"]
TEXT_ENDS = ["output_text.done", "content_part.done", "output_item.done"]


def ask(client, **body):
    return client.responses.create(**{"model": "tiny", "input": "hi"} | body)


def plain(response):
    """The output without what is drawn anew each time."""
    items = [item.model_dump(exclude={"id", "call_id"}) for item in response.output]
    return response.status, items, response.usage.output_tokens


def kinds(events):
    """Types in order, a run of the same one told once."""
    names = [event.type.removeprefix("response.") for event in events]
    return [name for n, name in enumerate(names) if n == 0 or name != names[n - 1]]


def test_text_comes_in_the_exact_order_of_events(server, client):
    server.say("你好，世界！")
    events = list(ask(client, stream=True))
    assert kinds(events) == ["created", "in_progress", *TEXT_EVENTS, *TEXT_ENDS, "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == "你好，世界！"
    assert plain(events[-1].response) == plain(ask(client))


def test_thoughts_text_and_calls_are_items_one_after_the_other(server, client):
    server.say(ANSWER)
    with client.responses.stream(model="tiny", input="hi", tools=TOOLS) as stream:
        events = list(stream)
        final = stream.get_final_response()
    steps = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done"]
    thoughts = ["output_item.added", "content_part.added", "reasoning_text.delta"]
    thoughts_end = ["reasoning_text.done", "content_part.done", "output_item.done"]
    assert kinds(events)[2:-1] == [
        *(*thoughts, *thoughts_end, *TEXT_EVENTS, *TEXT_ENDS, *steps, "output_item.done")
    ]
    whole = ask(client, tools=TOOLS)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.output[0].content[0].text == "hm"
    assert whole.output_text == "Let me see."
    assert json.loads(whole.output[2].arguments) == {"city": "北京"}
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert whole.usage.output_tokens_details.reasoning_tokens > 0


def test_a_round_trip_with_a_tool_is_one_conversation(server, client):
    server.say(ANSWER)
    first = ask(client, tools=TOOLS, instructions="brief", include=["reasoning.encrypted_content"])
    sealed = first.output[0].model_dump(include={"type", "encrypted_content", "id", "summary"})
    call = first.output[2]
    server.say("rain")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "下雨"}
    rest = [item.model_dump() for item in first.output[1:]]
    history = [{"role": "user", "content": "hi"}, sealed, *rest, output]
    assert ask(client, input=history, tools=TOOLS, instructions="brief").output_text == "rain"
    said = {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm"}
    arguments = {"name": "f", "arguments": {"city": "北京"}}
    wanted = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "hi"},
        {**said, "tool_calls": [arguments]},
        {"role": "tool", "content": "下雨"},
    ]
    tool = {"function": {"name": "f", "parameters": {"type": "object"}}}
    ids = server.tokenizer.apply_chat_template(wanted, tools=[tool])
    assert list(server.script.tasks[0].prompt_ids) == ids


def test_an_answer_cut_off_is_incomplete(server, client):
    server.say("hello world, hello world")
    events = list(ask(client, max_output_tokens=2, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"
    assert plain(events[-1].response) == plain(ask(client, max_output_tokens=2))


def test_a_call_cut_off_is_incomplete_too(server, client):
    server.say(ANSWER)
    tokens = len(server.tokenizer.encode(ANSWER)) - len(
        server.tokenizer.encode('京"}}\n</tool_call>')
    )
    whole = ask(client, tools=TOOLS, max_output_tokens=tokens)
    assert (whole.status, whole.output[-1].status) == ("incomplete", "incomplete")
    assert whole.output[-1].type == "function_call"


def test_log_probabilities_are_told_where_asked(server, client):
    server.say("hello world")
    whole = ask(client, top_logprobs=2).output[0].content[0]
    assert "".join(one.token for one in whole.logprobs) == "hello world"
    assert {len(one.top_logprobs) for one in whole.logprobs} == {2}
    streamed = [
        one
        for event in ask(client, top_logprobs=2, stream=True)
        if event.type == "response.output_text.delta"
        for one in event.logprobs
    ]
    assert [one.token for one in streamed] == [one.token for one in whole.logprobs]
    assert ask(client).output[0].content[0].logprobs == []


def test_parse_gives_an_object(server, client):
    class Person(BaseModel):
        name: str

    server.say('{"name": "李"}')
    parsed = client.responses.parse(model="tiny", input="hi", text_format=Person)
    assert parsed.output_parsed == Person(name="李")
    schema = json.loads(server.script.tasks[0].params.structure.json_schema)
    assert schema["required"] == ["name"]


def test_an_engine_that_fails_in_mid_answer_is_told_in_the_stream(server, client):
    server.say("hello world")
    server.hold(at=2)
    stream = ask(client, stream=True)
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    server.script.answer = "crash"
    server.script.go.set()
    rest = list(stream)
    error, failed = rest[-2:]
    assert (error.type, failed.type) == ("error", "response.failed")
    assert "the script broke" in error.message
    assert failed.response.status == "failed"


def test_an_async_client_reads_it_too(server):
    async def read():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any")
        async with client, client.responses.stream(model="tiny", input="hi") as stream:
            return (await stream.get_final_response()).output_text

    assert asyncio.run(read()) == "hello"


WRONG = [
    ("previous_response_id", {"previous_response_id": "resp_1"}),
    ("background", {"background": True}),
    ("store", {"store": True}),
    ("conversation", {"conversation": "conv_1"}),
    ("input", {"input": []}),
    (
        "input[0].content[0].type",
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
    ),
    ("input[0].type", {"input": [{"type": "item_reference", "id": "x"}]}),
    ("tools[0].type", {"tools": [{"type": "web_search"}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("text.verbosity", {"text": {"verbosity": "low"}}),
    ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "a"}}}),
    ("include[0]", {"include": ["file_search_call.results"]}),
    ("reasoning.summary", {"reasoning": {"summary": "detailed"}}),
    ("stream_options.include_obfuscation", {"stream_options": {"include_obfuscation": True}}),
]


@pytest.mark.parametrize(("param", "body"), WRONG, ids=[param for param, _ in WRONG])
def test_what_cannot_be_had_is_refused_by_name(server, param, body):
    response = server.http.post("/v1/responses", json={"model": "tiny", "input": "hi"} | body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert param.split(".")[0].split("[")[0] in error["message"]


def test_stored_responses_are_not_to_be_had(client):
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
