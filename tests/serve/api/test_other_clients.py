"""Clients built on OpenAI's protocol. They bring much with them, so they are no part of the extras.

pip install langchain-openai litellm
pytest -m slow tests/serve/api/test_other_clients.py
"""

from typing import Any

import pytest

# their warnings are theirs
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "北京"}}\n</tool_call>'
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_langchain_talks_and_calls_tools(server, responses):
    langchain: Any = pytest.importorskip("langchain_openai", reason="langchain-openai is missing")
    model = langchain.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="any", model="tiny", use_responses_api=responses
    )
    assert model.invoke("hi").text == "hello"
    assert "".join(chunk.text for chunk in model.stream("hi")) == "hello"
    server.say(CALL)
    (call,) = model.bind_tools(TOOLS).invoke("hi").tool_calls
    assert (call["name"], call["args"]) == ("f", {"city": "北京"})


def test_litellm_talks_and_calls_tools(server):
    litellm: Any = pytest.importorskip("litellm", reason="litellm is missing")
    where = {"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "any"}
    hi = [{"role": "user", "content": "hi"}]
    answer = litellm.completion(messages=hi, **where)
    assert answer.choices[0].message.content == "hello"
    pieces = litellm.completion(messages=hi, stream=True, **where)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "hello"
    server.say(CALL)
    (call,) = litellm.completion(messages=hi, tools=TOOLS, **where).choices[0].message.tool_calls
    assert call.function.name == "f"
