"""Every parameter of the official SDK: the engine or the answer changes, or a 400 names it.

The lists are the SDK's own, so that a parameter of its next version fails here until it is decided.
Labels, which only name a request, are the one exception; they are few and written down.
"""

import inspect
from typing import Any

import pytest
from openai.resources.chat.completions import Completions as Chats
from openai.resources.completions import Completions
from openai.resources.responses import Responses

from astrai_serve.api.openai_parameters import LABELS

HI = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {"name": "f", "description": "d", "parameters": {"type": "object"}}
CHAT_TOOL = {"type": "function", "function": TOOL}
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
JSON = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}
TEXT_JSON = {"format": {"type": "json_schema", "name": "a", "schema": {"type": "integer"}}}
REFUSED = object()
ANSWER = "hello hello world"

SAMPLING: dict[str, Any] = {
    "frequency_penalty": 1.0,
    "logit_bias": {"5": 3},
    "presence_penalty": 1.0,
    "seed": 7,
    "stop": "wor",
    "temperature": 0.25,
    "top_p": 0.5,
    "user": "u",
    "stream": True,
    "model": "other",
}
EXTRAS: dict[str, Any] = {
    "top_k": 3,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
    "stop_token_ids": [7],
    "include_stop_str_in_output": ({"stop": "wor"}, True),
    "ignore_eos": True,
    "min_tokens": 3,
    "skip_special_tokens": False,
    "structured_outputs": {"choice": ["hello"]},
    "guided_json": {"type": "integer"},
    "guided_regex": "[a-z ]+",
    "guided_choice": ["hello"],
    "guided_grammar": 'start: "hello"',
    "priority": 1,
    "cache_salt": "s",
    "chat_template": REFUSED,
    "documents": REFUSED,
    "truncate_prompt_tokens": REFUSED,
}
CHATS: dict[str, Any] = {
    **SAMPLING,
    **EXTRAS,
    "max_completion_tokens": 1,
    "max_tokens": 1,
    "messages": [{"role": "user", "content": "other"}],
    "n": 2,
    "logprobs": True,
    "top_logprobs": ({"logprobs": True}, 2),
    "tools": [CHAT_TOOL],
    "tool_choice": ({"tools": [CHAT_TOOL]}, "required"),
    "parallel_tool_calls": ({"tools": [CHAT_TOOL]}, False),
    "response_format": JSON,
    "reasoning_effort": "high",
    "stream_options": ({"stream": True}, {"include_usage": True}),
    "service_tier": "flex",
    "prompt_logprobs": 1,
    "return_token_ids": True,
    "return_progress": ({"stream": True}, True),
    "chat_template_kwargs": {"enable_thinking": True},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "echo": REFUSED,
    **dict.fromkeys(["audio", "function_call", "functions", "moderation", "prediction"], REFUSED),
    **dict.fromkeys(["modalities", "prompt_cache_options", "prompt_cache_retention"], REFUSED),
    **dict.fromkeys(["store", "verbosity", "web_search_options"], REFUSED),
}
COMPLETIONS: dict[str, Any] = {
    **SAMPLING,
    **EXTRAS,
    "prompt": [104, 105],
    "best_of": REFUSED,
    "echo": True,
    "logprobs": 1,
    "max_tokens": 1,
    "n": 2,
    "stream_options": ({"stream": True}, {"include_usage": True}),
    "suffix": REFUSED,
    "response_format": JSON,
    "prompt_logprobs": 1,
    "return_token_ids": True,
    "return_progress": ({"stream": True}, True),
    "priority": -1,
}
RESPONSES: dict[str, Any] = {
    **SAMPLING,
    **EXTRAS,
    "input": "other",
    "instructions": "be brief",
    "include": ["message.output_text.logprobs"],
    "max_output_tokens": 1,
    "parallel_tool_calls": ({"tools": [{"type": "function", **TOOL}]}, False),
    "reasoning": {"effort": "high"},
    "service_tier": "flex",
    "stream_options": REFUSED,
    "return_progress": REFUSED,
    "text": TEXT_JSON,
    "tool_choice": ({"tools": [{"type": "function", **TOOL}]}, "required"),
    "tools": [{"type": "function", **TOOL}],
    "top_logprobs": 1,
    "chat_template_kwargs": {"enable_thinking": True},
    **dict.fromkeys(["access_programs", "background", "background_options", "image"], REFUSED),
    **dict.fromkeys(["context_management", "conversation", "max_tool_calls"], REFUSED),
    **dict.fromkeys(["moderation", "previous_response_id", "prompt", "truncation"], REFUSED),
    **dict.fromkeys(["prompt_cache_options", "prompt_cache_retention", "store"], REFUSED),
}
ASKED_FOR_WRONGLY: dict[str, Any] = {
    "best_of": 2,
    "modalities": ["text", "audio"],
    "stream_options": {"include_obfuscation": True},
    "verbosity": "low",
}
ENDPOINTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any]] = {
    "chat": ("/v1/chat/completions", {"messages": HI}, CHATS, Chats),
    "completions": ("/v1/completions", {"prompt": "hi"}, COMPLETIONS, Completions),
    "responses": ("/v1/responses", {"input": "hi"}, RESPONSES, Responses),
}
TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
CASES = [(name, param) for name, (_, _, table, _) in ENDPOINTS.items() for param in table]


@pytest.mark.parametrize("name", ENDPOINTS)
def test_every_parameter_of_the_sdk_is_decided(name):
    *_, table, resource = ENDPOINTS[name]
    known = set(inspect.signature(resource.create).parameters) - TRANSPORT
    assert len(known) > 15
    assert known - LABELS - table.keys() == set()


def seen(server, path, body):
    """What the engine was asked and the client was told, without what differs each time."""
    server.say(CALL if "tools" in body else ANSWER)
    response = server.http.post(path, json=body)
    if response.status_code != 200:
        return response.status_code, response.json()["error"]["param"]
    told = response.text.partition("data:")[2] or response.json()
    if isinstance(told, dict):
        keys = ("choices", "output", "prompt_token_ids")
        told = [strip(told.get(key)) for key in keys]
    else:
        names = ('"usage"', '"prompt_progress"')
        told = (response.headers["content-type"], *(name in told for name in names))
    tasks = [
        (t.prompt_ids, t.params, t.cache_salt, t.sample_index, t.is_bulk)
        for t in sorted(server.script.tasks, key=lambda task: task.sample_index)
    ]
    return told, tasks


def strip(value):
    """Leave ids out."""
    if isinstance(value, dict):
        return {k: strip(v) for k, v in value.items() if k not in ("id", "call_id")}
    return [strip(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("name", "param"), CASES, ids=[f"{n}-{p}" for n, p in CASES])
def test_a_parameter_changes_something_or_is_refused_by_name(server, name, param):
    path, minimal, table, _ = ENDPOINTS[name]
    value, base = table[param], dict(minimal)
    if param == "continue_final_message":
        base = {"messages": [*HI, {"role": "assistant", "content": "hel"}]}
    if isinstance(value, tuple):
        more, value = value
        base |= more
    if value is REFUSED:
        status, named = seen(server, path, base | {param: ASKED_FOR_WRONGLY.get(param, True)})
        assert (status, str(named).partition(".")[0]) == (400, param)
        return
    before, after = seen(server, path, base), seen(server, path, base | {param: value})
    if param == "user":
        assert before == after  # a label
    elif param == "model":
        assert after == (404, "model")
    else:
        assert after[0] != 400, after
        assert before != after


@pytest.mark.parametrize("param", sorted(LABELS))
def test_a_label_is_taken(server, param):
    value = {"a": "b"} if param == "metadata" else "x"
    for path, minimal, *_ in ENDPOINTS.values():
        assert server.http.post(path, json={**minimal, param: value}).status_code == 200
