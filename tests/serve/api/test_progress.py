"""How far a long prompt has come, told to streams that ask; a real model, 9 tokens a step."""

import json
import re
import uuid
from typing import Any

import httpx2
import openai
import pytest

ADDRESSES = ["/v1/chat/completions", "/v1/completions"]


@pytest.fixture(scope="module")
def http(tiny_url):
    with httpx2.Client(base_url=tiny_url, timeout=60) as http:
        yield http


def stream(http, address, **body):
    """The text of a stream after a prompt that no other test has put into the cache."""
    text = f"{uuid.uuid4().hex} " + "今天 " * 12
    said = {"messages": [{"role": "user", "content": text}]}
    prompt = said if address == ADDRESSES[0] else {"prompt": text}
    more = {"stream": True, "max_tokens": 5, "seed": 1, "cache_salt": text}
    response = http.post(address, json=prompt | more | body)
    assert response.status_code == 200, response.text
    return response.text


def chunks(text):
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def told(text):
    return [chunk["prompt_progress"] for chunk in chunks(text) if "prompt_progress" in chunk]


@pytest.mark.parametrize("address", ADDRESSES)
def test_progress_rises_to_the_end_of_the_prompt_and_then_comes_text(http, address):
    text = stream(http, address, return_progress=True, stream_options={"include_usage": True})
    whole = chunks(text)
    num_prompt_tokens = whole[-1]["usage"]["prompt_tokens"]
    progress = told(text)
    processed = [one["processed"] for one in progress]
    assert processed == [*range(9, num_prompt_tokens, 9), num_prompt_tokens]
    assert len(processed) > 4
    assert {(one["total"], one["cache"]) for one in progress} == {(num_prompt_tokens, 0)}
    times = [one["time_ms"] for one in progress]
    assert times == sorted(times)
    assert times[0] > 0
    kinds = "".join(
        "p" if "prompt_progress" in chunk
        else "t" if chunk["choices"] and says(chunk["choices"][0]) else "-"
        for chunk in whole
    )  # fmt: skip
    assert re.fullmatch("-?p+[t-]*t[t-]*", kinds), kinds
    assert all(chunk["choices"] == [] for chunk in whole if "prompt_progress" in chunk)


def says(choice):
    return choice.get("text") or choice.get("delta", {}).get("content")


@pytest.mark.parametrize("address", ADDRESSES)
def test_who_does_not_ask_hears_nothing_of_it(http, address):
    prompt = {"messages": [{"role": "user", "content": "今天 " * 12}], "prompt": "今天 " * 12}

    def said(**asked):
        return chunks(stream(http, address, **prompt, **asked))

    def neutral(one):
        return {key: value for key, value in one.items() if key not in ("id", "created")}

    silent = [neutral(one) for one in said()]
    assert [neutral(one) for one in said(return_progress=False)] == silent
    spoken = [neutral(one) for one in said(return_progress=True)]
    assert [one for one in spoken if "prompt_progress" not in one] == silent
    assert len(spoken) > len(silent)


def test_prompts_and_samples_are_counted_together(http):
    prompts = ["今天 " * 12, "北京 " * 9]
    text = stream(http, ADDRESSES[1], prompt=prompts, n=2, return_progress=True)
    progress = told(text)
    processed = [one["processed"] for one in progress]
    assert processed == sorted(set(processed))
    assert processed[-1] == progress[-1]["total"]


def test_cached_tokens_are_told_apart(http):
    body = {"prompt": "今天 " * 20, "cache_salt": "seen", "return_progress": True}
    first, again = (told(stream(http, ADDRESSES[1], **body)) for _ in range(2))
    assert first[0]["cache"] == 0
    assert again[0]["cache"] > 30
    assert again[0]["processed"] > again[0]["cache"]
    assert again[-1]["processed"] == first[-1]["processed"] == first[-1]["total"]


def test_token_ids_are_told_once_and_whole(http):
    asked = {"return_token_ids": True, "return_progress": True}
    for address in ADDRESSES:
        choices = [
            one for chunk in chunks(stream(http, address, **asked)) for one in chunk["choices"]
        ]
        assert sum("prompt_token_ids" in one for one in choices) == 1
        assert len([i for one in choices for i in one.get("token_ids", [])]) == 5


def test_an_answer_in_one_piece_has_no_progress(http):
    body = {"prompt": "今天", "max_tokens": 2, "return_progress": True}
    assert "prompt_progress" not in http.post(ADDRESSES[1], json=body).json()


def test_the_official_client_reads_such_a_stream(tiny_url):
    messages: Any = [{"role": "user", "content": "你好 " * 20}]
    asked = {"return_progress": True, "cache_salt": uuid.uuid4().hex}
    with openai.OpenAI(base_url=f"{tiny_url}/v1", api_key="any", max_retries=0) as client:
        with client.chat.completions.stream(
            model="tiny", messages=messages, max_tokens=5, extra_body=asked
        ) as events:
            kinds = [event.type for event in events]
            message = events.current_completion_snapshot.choices[0].message
        plain = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=5, extra_body=asked, stream=True
        )
        seen = [chunk for chunk in plain if (chunk.model_extra or {}).get("prompt_progress")]
    assert message.content is not None
    assert kinds.count("chunk") > 5
    assert len(seen) >= 1
