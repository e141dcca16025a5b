"""What is refused, and whether the refusal names the parameter."""

from typing import Any

import openai
import pytest

from astrai_serve.api.openai_requests import ChatCompletionRequest, CompletionRequest

HI = [{"role": "user", "content": "hi"}]

WRONG_CHATS = [
    ("messages", {"messages": []}),
    ("messages", {"messages": None}),
    ("messages[0].role", {"messages": [{"role": "judge", "content": "x"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 3}]}),
    (
        "messages[0].content[0].type",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ),
    (
        "messages[1].tool_calls[0].function",
        {"messages": [*HI, {"role": "assistant", "tool_calls": [{}]}]},
    ),
    ("messages[1].audio", {"messages": [*HI, {"role": "assistant", "audio": {"id": "a"}}]}),
    ("temperature", {"temperature": 2.5}),
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": True}),
    ("top_p", {"top_p": -0.1}),
    ("top_k", {"top_k": 1.5}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
    ("min_tokens", {"min_tokens": 5, "max_tokens": 4}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("seed", {"seed": 2**64}),
    ("stop", {"stop": ""}),
    ("stop[1]", {"stop": ["a", 1]}),
    ("stop", {"stop": list("abcdefghijklmnopq")}),
    ("stop_token_ids", {"stop_token_ids": [10**6]}),
    ("logit_bias", {"logit_bias": {"x": 1}}),
    ("logit_bias.5", {"logit_bias": {"5": 101}}),
    ("logit_bias", {"logit_bias": {"999999": 1}}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("stream", {"stream": "yes"}),
    ("stream_options.include_usage", {"stream_options": {"include_usage": 1}}),
    ("tools[0].type", {"tools": [{"type": "custom", "custom": {"name": "f"}}]}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "f g"}}]}),
    (
        "tool_choice",
        {
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": {"type": "function", "function": {"name": "g"}},
        },
    ),
    ("chat_template_kwargs", {"chat_template_kwargs": {"tools": []}}),
    ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
    ("tool_choice", {"tool_choice": "required"}),
    ("response_format", {"response_format": {"type": "json_schema"}}),
    ("store", {"store": True}),
]

WRONG_COMPLETIONS = [
    ("prompt", {}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": {"text": "x"}}),
    ("prompt", {"prompt": [10**6]}),
    ("prompt[0]", {"prompt": [-1]}),
    ("n", {"prompt": ["a", "b"], "n": 65}),
    ("echo", {"prompt": "a", "echo": True, "logprobs": 1, "stream": True}),
    ("best_of", {"prompt": "a", "best_of": 2}),
    ("suffix", {"prompt": "a", "suffix": "b"}),
    ("logprobs", {"prompt": "a", "logprobs": 21}),
]


def check_refusal(response, param):
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0].split("[")[0] in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(("param", "body"), WRONG_CHATS)
def test_a_wrong_chat_is_refused_by_name(server, param, body):
    response = server.http.post("/v1/chat/completions", json={"messages": HI} | body)
    check_refusal(response, param)
    server.wait_idle()


@pytest.mark.parametrize(("param", "body"), WRONG_COMPLETIONS)
def test_a_wrong_completion_is_refused_by_name(server, param, body):
    check_refusal(server.http.post("/v1/completions", json=body), param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b'{"messages": NaN}', b"\xff\xfe{}"])
def test_what_is_not_a_json_object_is_refused(server, body):
    headers = {"content-type": "application/json"}
    response = server.http.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "bad_json"


def test_json_nested_beyond_reason_is_refused(server):
    body = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    headers = {"content-type": "application/json"}
    response = server.http.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400


def test_the_official_client_raises_its_own_exception(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HI, temperature=9)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    assert "9" in str(caught.value)


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert caught.value.code == "model_not_found"
    assert "'tiny'" in str(caught.value)


def test_a_prompt_that_cannot_fit_is_never_cut(server, client):
    context = server.engine.max_context
    for content in ("x " * context, "长" * 100_000):
        long = [{"role": "user", "content": content}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=long)
        assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HI, max_tokens=context)
    assert caught.value.code == "context_length_exceeded"
    assert "lower max_tokens to" in str(caught.value)


def test_what_is_too_long_only_together_is_refused_before_it_is_tokenized(server, client):
    most = server.tokenizer.longest_token * server.engine.max_context
    turns: list[Any] = [{"role": "user", "content": "x" * (most // 3)}] * 4
    with pytest.raises(openai.BadRequestError, match=r"messages: .* cannot fit") as caught:
        client.chat.completions.create(model="tiny", messages=turns)
    assert caught.value.code == "context_length_exceeded"
    prompts = ["x" * (most // 3)] * 4  # of several prompts each one counts for itself
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.completions.create(model="tiny", prompt=prompts)


def test_unknown_parameters_and_labels_are_ignored(server):
    labels = {"user": "u", "metadata": {"a": "b"}, "prompt_cache_key": "k", "brand_new": [1]}
    harmless = {"tools": [], "n": None, "tool_choice": "auto", "response_format": {"type": "text"}}
    assert server.chat(**labels, **harmless).status_code == 200


def test_a_tool_message_of_null_content_and_empty_turns_are_taken(server):
    messages = [*HI, {"role": "assistant", "content": None}, {"role": "user", "content": ""}]
    response = server.http.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 200


def test_the_published_schema_is_the_one_that_is_used(server):
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    for body in (ChatCompletionRequest, CompletionRequest):
        assert schemas[body.__name__]["properties"].keys() == body.model_fields.keys()
