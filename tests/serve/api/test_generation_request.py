"""Clients that leave, engines that fail, queues that are full: no task is left, no client waits."""

import contextlib
from typing import Any

import httpx2
import openai
import pytest

from astrai_serve.engine import EngineConfig
from astrai_serve.generation_defaults import GenerationDefaults

HI: Any = [{"role": "user", "content": "hi"}]
ENDLESS = {"ignore_eos": True, "max_tokens": 300}


@contextlib.contextmanager
def streaming(server, content="hi", **body):
    """A stream whose client leaves at the end of the block, as a closed browser tab does."""
    messages = [{"role": "user", "content": content}]
    body = {"messages": messages, "stream": True} | body
    with (
        httpx2.Client(base_url=server.url, timeout=20) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        assert response.status_code == 200
        yield response


def counts(server):
    stats = server.engine.stats()
    return {name: stats[name] for name in ("num_finished_cancelled", "generation_tokens")}


def test_a_client_that_leaves_while_its_prompt_is_computed_frees_the_task(server):
    before = counts(server)
    server.hold()
    steps = server.engine.stats()["num_steps"]
    with streaming(server, "x" * 200):  # at least four steps of 64 tokens
        server.wait(lambda: server.engine.stats()["num_steps"] == steps + 1)
    server.wait_cancelled()
    after = counts(server)
    assert after["num_finished_cancelled"] == before["num_finished_cancelled"] + 1
    assert after["generation_tokens"] == before["generation_tokens"]
    assert server.engine.stats()["num_steps"] <= steps + 2


def test_a_client_that_leaves_the_queue_harms_nobody(server):
    before = counts(server)
    server.hold()
    with contextlib.ExitStack() as running:
        for _ in range(8):
            running.enter_context(streaming(server, max_tokens=4, ignore_eos=True))
        # its prompt differs, or it might share the others' pages
        with streaming(server, "queued"):
            server.wait(lambda: server.engine.stats()["num_open"] == 9)
        server.wait(lambda: server.shutdown.num_open == 8)
        server.script.go.set()
        server.wait_idle()
    assert server.engine.stats()["num_finished_cancelled"] == before["num_finished_cancelled"] + 1
    assert {len(task.token_ids) - len(task.prompt_ids) for task in server.script.tasks} == {4}
    assert len(server.script.tasks) == 8


def test_a_client_that_leaves_in_mid_answer_frees_the_task(server):
    before = counts(server)
    server.hold(at=5)
    with streaming(server, **ENDLESS) as response:
        lines = response.iter_lines()
        while '"content":"h' not in next(lines):
            pass
    server.wait_cancelled()
    after = counts(server)
    assert after["num_finished_cancelled"] == before["num_finished_cancelled"] + 1
    assert after["generation_tokens"] - before["generation_tokens"] <= 6


def test_leaving_before_a_whole_answer_is_there_frees_all_its_tasks(server):
    before = counts(server)
    server.hold()
    address, body = f"{server.url}/v1/chat/completions", {"messages": HI, "n": 3}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(address, json=body, timeout=0.3)
    server.wait_cancelled()
    after = counts(server)
    assert after["num_finished_cancelled"] == before["num_finished_cancelled"] + 3


def test_a_full_queue_is_told_with_a_time_to_come_back(start_server):
    config = EngineConfig(max_running_tasks=1, max_queued_tasks=1)
    with start_server(engine_config=config) as server, contextlib.ExitStack() as waiting:
        server.hold()
        for _ in range(2):
            waiting.enter_context(streaming(server))
        refused = server.chat()
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert 0 < int(refused.headers["retry-after"]) <= 120
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="tiny", messages=HI)


def test_the_official_client_comes_back_when_the_queue_is_free(start_server):
    config = EngineConfig(max_running_tasks=1, max_queued_tasks=1)
    with start_server(engine_config=config) as server, contextlib.ExitStack() as waiting:
        server.hold()
        for _ in range(2):
            waiting.enter_context(streaming(server))
        assert server.chat().status_code == 429
        server.script.go.set()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=2) as client:
            answer = client.chat.completions.create(model="tiny", messages=HI)
        assert answer.choices[0].message.content == "hello"


HELD = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


def test_samples_that_do_not_all_fit_into_the_queue_leave_none_there(start_server):
    config = EngineConfig(max_running_tasks=1, max_queued_tasks=1)
    with start_server(engine_config=config) as server:
        server.hold()
        leaving = server.http.stream("POST", "/v1/chat/completions", json=HELD)
        with leaving:
            assert server.chat(n=2).status_code == 429
            assert server.chat(n=3).status_code == 400  # would never fit
        server.script.go.set()
        server.wait_idle()
        assert server.chat().status_code == 200


def test_an_engine_that_fails_in_mid_answer_is_told_in_the_stream(server, client):
    server.say("hello world")
    server.hold(at=2)
    stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
    said = ""
    for chunk in stream:
        said += chunk.choices[0].delta.content or ""
        if said:
            break
    server.script.answer = "crash"
    server.script.go.set()
    with pytest.raises(openai.APIError, match="the script broke") as caught:
        list(stream)
    assert caught.value.code == "internal_error"
    server.wait_idle()
    server.say("well again")
    assert server.chat().json()["choices"][0]["message"]["content"] == "well again"


def test_an_engine_that_fails_before_a_whole_answer_is_a_500_not_to_be_repeated(server):
    server.say("crash")
    response = server.chat()
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert "the script broke" in response.json()["error"]["message"]


def test_a_slow_reader_loses_nothing(server):
    answer = "天气很好 " * 60
    server.say(answer)
    with streaming(server, max_tokens=490) as response:
        server.wait(lambda: server.engine.stats()["num_open"] == 0)
        response.read()
    said = "".join(
        choice["delta"].get("content", "")
        for chunk in server.chunks(response)
        for choice in chunk["choices"]
    )
    assert said == answer[: len(said)]
    assert len(said) > 200


LIMITED = GenerationDefaults(max_new_tokens=3)


def test_a_limit_that_the_model_folder_wants_gives_way_to_requests_and_to_the_context(
    start_server,
):
    with start_server(defaults=LIMITED) as server:
        server.say("hello world " * 60)

        def limits(send, *said, **body):
            server.script.tasks.clear()
            response = send(*said, **body)
            assert response.status_code == 200, response.text
            return [task.max_tokens for task in server.script.tasks], response.json()

        tasks, answer = limits(server.chat)
        assert tasks == [3]
        assert answer["choices"][0]["finish_reason"] == "length"
        assert limits(server.complete)[0] == [3]
        assert limits(server.chat, max_tokens=5)[0] == [5]
        assert limits(server.chat, min_tokens=4)[0] == [4]
        long = [104] * 510
        assert sorted(limits(server.complete, [[104], long])[0]) == [2, 3]
        body = {"input": "hi"}
        assert limits(lambda: server.http.post("/v1/responses", json=body))[0] == [3]
