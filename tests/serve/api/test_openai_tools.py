"""Tools and thoughts with the official client: round trips, helpers, cuts at every place."""

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

HI: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
THOUGHT = "<think>\nhm\n</think>\n\n"
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "北京"}}\n</tool_call>'


def ask(client, **body):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": HI, "tools": TOOLS} | body
    )


def test_a_round_trip_with_two_tools(server, client):
    server.say(f"{THOUGHT}Let me see.\n{CALL}\n{CALL}")
    choice = ask(client).choices[0]
    message = choice.message
    assert (choice.finish_reason, message.content) == ("tool_calls", "Let me see.")
    assert message.reasoning_content == "hm"
    assert [json.loads(c.function.arguments) for c in message.tool_calls] == [{"city": "北京"}] * 2
    first, second = (call.id for call in message.tool_calls)
    assert first != second
    server.say("rain")
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "下雨"} for call in message.tool_calls
    ]
    answer = ask(client, messages=[*HI, message.model_dump(), *results]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("rain", "stop")
    prompt = server.tokenizer.decode(server.script.tasks[0].prompt_ids, skip_special_tokens=False)
    assert (
        f"{THOUGHT}Let me see.\n{CALL}\n{CALL}<|im_end|>\n<|im_start|>tool\n下雨<|im_end|>"
        in prompt
    )


def test_the_stream_helper_reads_calls_of_several_answers(server, client):
    server.say(f"{THOUGHT}{CALL}")
    with client.chat.completions.stream(model="tiny", messages=HI, tools=TOOLS, n=2) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    for choice in final.choices:
        (call,) = choice.message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "北京"}
        assert choice.finish_reason == "tool_calls"


def test_parse_calls_a_pydantic_tool_and_gives_its_arguments(server, client):
    class Weather(BaseModel):
        city: str

    tool = openai.pydantic_function_tool(Weather, name="f")
    server.say(CALL)
    parsed = client.chat.completions.parse(model="tiny", messages=HI, tools=[tool])
    arguments = parsed.choices[0].message.tool_calls[0].function.parsed_arguments
    assert arguments == Weather(city="北京")
    assert server.script.tasks[0].params.structure is not None  # it is strict


def test_an_answer_cut_off_says_length_wherever_it_was_cut(server, client):
    answer = f"{THOUGHT}Let me see.\n{CALL}"
    server.say(answer)
    total = len(server.tokenizer.encode(answer))
    for limit in range(1, total, 7):
        whole = ask(client, max_tokens=limit).choices[0]
        assert whole.finish_reason == "length"
        text, arguments = "", ""
        for chunk in ask(client, max_tokens=limit, stream=True):
            delta = chunk.choices[0].delta
            text += delta.content or ""
            for call in delta.tool_calls or []:
                arguments += call.function.arguments
        calls = whole.message.tool_calls or []
        assert text == (whole.message.content or "")
        assert arguments == "".join(call.function.arguments for call in calls)


def test_what_is_no_call_is_told_as_text(server, client):
    server.say("<tool_call>{'name': 'f'}</tool_call>")
    choice = ask(client).choices[0]
    assert choice.message.content == "<tool_call>{'name': 'f'}</tool_call>"
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")


def test_without_tools_or_with_choice_none_the_model_hears_of_none(server, client):
    server.say(CALL)
    answer = ask(client, tool_choice="none").choices[0]
    assert (answer.message.content, answer.finish_reason) == (CALL, "stop")
    plain = server.tokenizer.apply_chat_template(HI)
    assert list(server.script.tasks[0].prompt_ids) == plain


def test_a_last_message_is_gone_on_with(server, client):
    messages = [*HI, {"role": "assistant", "content": "hel"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    server.say("lo")
    answer = ask(client, messages=messages, tools=openai.NOT_GIVEN, extra_body=more)
    assert answer.choices[0].message.content == "lo"
    prompt = server.tokenizer.decode(server.script.tasks[0].prompt_ids, skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>assistant\nhel")


def test_a_stop_string_may_be_kept(server, client):
    server.say("天气很好。STOP more")
    more = {"include_stop_str_in_output": True}
    whole = ask(client, stop="STOP", extra_body=more).choices[0]
    assert whole.message.content == "天气很好。STOP"
    pieces = ask(client, stop="STOP", extra_body=more, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == "天气很好。STOP"


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_told_where_asked(server, client, stream):
    server.say("hello")
    told = ask(client, stream=stream, extra_body={"return_token_ids": True})
    choices = [c.choices[0] for c in told] if stream else told.choices
    ids = [i for one in choices for i in getattr(one, "token_ids", None) or []]
    assert ids == [*server.tokenizer.encode("hello"), server.tokenizer.eos_id]
    prompts = [p for one in choices if (p := getattr(one, "prompt_token_ids", None))]
    assert prompts == [list(server.script.tasks[0].prompt_ids)]
