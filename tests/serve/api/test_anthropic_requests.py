"""Every parameter of Anthropic's client changes the answer, is a label, or is refused by name."""

import inspect

import anthropic
import pytest

from astrai_serve.api.anthropic_requests import MessagesRequest
from astrai_serve.engine.task import Task

HI = [{"role": "user", "content": "hi"}]
TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
OTHER = {**TOOL, "name": "g"}
SCHEMA = {"type": "object", "properties": {"x": {"enum": [1]}}, "required": ["x"]}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
THOUGHT = "<think>\nlet me\n</think>\n\nhello"


def post(server, **body):
    wishes = {"model": "tiny", "max_tokens": 400, "messages": HI} | body
    return server.http.post("/v1/messages", json=wishes)


def heard(server, says="hello", **body):
    """The task that a request became, and what was answered."""
    server.say(says)
    response = post(server, **body)
    assert response.status_code == 200, response.text
    task: Task = server.script.tasks[0]
    read = server.tokenizer.decode(task.prompt_ids, False)
    answer = response.json()
    said = [{k: v for k, v in one.items() if k != "id"} for one in answer["content"]]
    return task.params, read, (said, answer["stop_reason"])


# parameter, a value that must change something, and what else the request has
CHANGES = [
    ("max_tokens", 1, {}),
    ("messages", [{"role": "user", "content": "you"}], {}),
    ("system", "brief", {}),
    ("stop_sequences", ["ell"], {}),
    ("temperature", 0.3, {}),
    ("top_p", 0.5, {}),
    ("top_k", 3, {}),
    ("thinking", {"type": "enabled", "budget_tokens": 1024}, {"max_tokens": 2000}),
    ("thinking", {"type": "disabled"}, {}),
    ("thinking", {"type": "adaptive", "display": "omitted"}, {"says": THOUGHT}),
    ("tools", [TOOL], {}),
    ("tools", [TOOL], {"says": CALL}),
    ("tools", [{**TOOL, "description": "does f"}], {"tools": [TOOL]}),
    ("tool_choice", {"type": "none"}, {"tools": [TOOL], "says": CALL}),
]
REFUSED = [
    ("max_tokens", {"max_tokens": None}),
    ("max_tokens", {"max_tokens": -1}),
    ("messages", {"messages": []}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 3}]}),
    ("messages[0]", {"messages": [{"role": "tool", "content": "x"}]}),
    (
        "messages[0].content[0]",
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
    ),
    (
        "messages[1].content[0]",
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]},
            ]
        },
    ),
    ("system", {"system": 3}),
    ("temperature", {"temperature": 2.5}),
    ("top_p", {"top_p": 2}),
    ("top_k", {"top_k": -1}),
    ("stop_sequences", {"stop_sequences": [""]}),
    ("stop_sequences", {"stop_sequences": list("abcdefghijklmnopq")}),
    ("stream", {"stream": "yes"}),
    ("container", {"container": "c"}),
    ("diagnostics", {"diagnostics": {"previous_message_id": None}}),
    ("inference_geo", {"inference_geo": "us"}),
    ("speed", {"speed": "fast"}),
    ("service_tier", {"service_tier": "batch"}),
    ("mcp_servers", {"mcp_servers": [{"name": "x"}]}),
    ("context_management", {"context_management": {"edits": [{}]}}),
    ("output_config.effort", {"output_config": {"effort": "low"}}),
    ("thinking.type", {"thinking": {"type": "between_tools"}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled"}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 3}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ("tools[0].type", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
    ("tools[0].name", {"tools": [{**TOOL, "name": "a b"}]}),
    ("tools[0].input_schema", {"tools": [{"name": "f"}]}),
    ("tool_choice", {"tool_choice": {"type": "any"}}),
    ("tool_choice", {"tool_choice": {"type": "tool", "name": "h"}, "tools": [TOOL]}),
    ("tool_choice.name", {"tool_choice": {"type": "tool"}, "tools": [TOOL]}),
    ("tool_choice.type", {"tool_choice": {"type": "maybe"}, "tools": [TOOL]}),
]
# the reciting engine takes the form and does not keep to it; a real model obeys in
# test_forced_forms.py
STRUCTURED = [
    ("tool_choice", {"tool_choice": {"type": "any"}, "tools": [TOOL]}),
    ("tool_choice", {"tool_choice": {"type": "tool", "name": "g"}, "tools": [TOOL, OTHER]}),
    (
        "tool_choice",
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "tools": [TOOL]},
    ),
    ("tools", {"tools": [{**TOOL, "strict": True}]}),
    ("output_config", {"output_config": {"format": FORMAT}}),
    ("output_config", {"output_config": {"format": FORMAT}, "tools": [TOOL]}),
    ("output_format", {"output_format": FORMAT}),
]
LABELS = {
    "metadata": {"user_id": "u"},
    "user_profile_id": "p",
    "workspace_id": "w",
    "cache_control": {"type": "ephemeral"},
    "service_tier": "standard_only",
    "brand_new": [1],
}
CLIENTS_OWN = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.mark.parametrize(("param", "value", "rest"), CHANGES)
def test_a_parameter_changes_what_is_asked_or_answered(server, param, value, rest):
    plain = heard(server, **rest)
    assert heard(server, **rest | {param: value}) != plain


def test_a_stream_is_streamed(server):
    assert post(server, stream=True).headers["content-type"].startswith("text/event-stream")
    assert post(server, stream=False).headers["content-type"] == "application/json"


@pytest.mark.parametrize(("param", "body"), REFUSED)
def test_what_is_wrong_or_unsupported_is_refused_by_name(server, param, body):
    error = post(server, **body)
    assert error.status_code == 400, error.text
    assert error.json()["error"]["type"] == "invalid_request_error"
    assert param in error.json()["error"]["message"]
    assert "\n" not in error.json()["error"]["message"]


@pytest.mark.parametrize(("param", "body"), STRUCTURED)
def test_a_form_is_asked_of_the_engine(server, param, body):
    def asked(**body):
        server.script.tasks.clear()
        assert post(server, **body).status_code == 200
        return server.script.tasks[0].params.structure

    assert asked() is None
    assert asked(**{name: value for name, value in body.items() if name != param}) is None
    assert asked(**body) is not None


def test_labels_and_unknown_parameters_change_nothing(server):
    assert heard(server, **LABELS) == heard(server)
    for name, value in LABELS.items():
        assert post(server, **{name: value}).status_code == 200


def test_no_parameter_of_the_client_is_forgotten():
    known = set(inspect.signature(anthropic.Anthropic(api_key="k").messages.create).parameters)
    told = {param.split(".")[0].split("[")[0] for param, *_ in (*CHANGES, *REFUSED, *STRUCTURED)}
    # the model is told apart in test_anthropic.py
    assert known - CLIENTS_OWN <= told | LABELS.keys() | {"model", "stream"}
    assert set(MessagesRequest.model_fields) <= told | LABELS.keys() | {"model", "stream"}


def test_a_question_mark_and_other_dates_and_betas_are_taken(server):
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "new-2030-01-01"}
    body = {"model": "tiny", "max_tokens": 9, "messages": HI}
    assert server.http.post("/v1/messages?beta=true", json=body, headers=headers).status_code == 200
