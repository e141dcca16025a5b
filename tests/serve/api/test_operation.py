"""Limits, turns, readiness and the log: what an operator relies on."""

import io
import json
import logging
import threading
from typing import Any

import httpx2
import openai
import pytest

from astrai_serve.engine import EngineConfig
from astrai_serve.log_format import JsonFormatter, TextFormatter

HI: Any = [{"role": "user", "content": "hi"}]
SECRET = "nobody-reads-this-in-a-log"


def start(server, **body):
    """Begin a stream and leave it open."""
    wishes = {"messages": HI, "stream": True} | body
    request = server.http.build_request("POST", "/v1/chat/completions", json=wishes)
    return server.http.send(request, stream=True)


def test_ready_says_no_when_the_queue_is_full_or_the_server_drains(start_server):
    small = EngineConfig(max_running_tasks=1, max_queued_tasks=1)
    with start_server(engine_config=small) as server:
        server.hold()
        streams = [start(server) for _ in range(2)]
        full = server.http.get("/ready")
        assert (full.status_code, full.json()) == (503, {"status": "the queue is full"})
        assert server.http.get("/health").status_code == 200
        for stream in streams:
            stream.close()
        server.wait_cancelled()
        assert server.http.get("/ready").status_code == 200
        server.shutdown.drain()
        assert server.http.get("/ready").status_code == 503
        assert server.http.get("/health").status_code == 200


def test_retry_after_follows_from_what_was_measured(start_server):
    small = EngineConfig(max_running_tasks=2, max_queued_tasks=2)
    with start_server(engine_config=small) as server:
        server.say("hello " * 100)
        server.hold()
        streams = [start(server, max_tokens=395) for _ in range(4)]
        waits = []
        for per_second in (0.25, 10.0, 80.0, 10_000.0):
            server.engine.restart_statistics()
            server.engine.statistics.prefill.add(1e6, 1)
            server.engine.statistics.decode.add(per_second, 1)
            refused = server.chat()
            assert refused.status_code == 429
            waits.append(int(refused.headers["retry-after"]))
        for stream in streams:
            stream.close()
        server.wait_cancelled()
    # by hand: a task of 395 tokens takes 395 / speed seconds, and a place is free after so long
    assert waits == [120, 40, 5, 1]


def test_an_answer_in_one_piece_is_refused_if_its_client_will_not_wait_for_it(start_server):
    with start_server() as server:
        server.say("hello " * 100)
        server.hold()
        stream = start(server, max_tokens=400)
        server.engine.restart_statistics()
        server.engine.statistics.prefill.add(1e6, 1)
        server.engine.statistics.decode.add(4, 1)  # 100 s of work are there
        make = {"base_url": f"{server.url}/v1", "api_key": "k", "max_retries": 0}
        with openai.OpenAI(timeout=30, **make) as hasty:
            with pytest.raises(openai.RateLimitError) as caught:
                hasty.chat.completions.create(model="tiny", messages=HI)
            assert caught.value.code == "too_much_work"
            assert caught.value.response.headers["retry-after"] in ("70", "71")
            streamed = hasty.chat.completions.create(model="tiny", messages=HI, stream=True)
            server.script.go.set()
            assert list(streamed)
        stream.read()
        with openai.OpenAI(timeout=30, **make) as hasty:
            assert hasty.chat.completions.create(model="tiny", messages=HI).choices


def test_prompts_and_time_are_limited(start_server):
    with start_server(max_prompt_tokens=30, max_seconds=0.3) as server:
        assert server.chat().status_code == 200
        long = server.chat("北京" * 40)
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        server.hold()
        slow = server.chat()
        assert (slow.status_code, slow.json()["error"]["code"]) == (504, "time_limit")
        assert slow.headers["x-should-retry"] == "false"
        assert "time_limit" in start(server).read().decode()
        server.wait_cancelled()
        assert server.shutdown.num_cancelled.values["time_limit"] == 2
        assert server.chat().status_code == 200


def test_chat_passes_completions_and_keys_take_turns(start_server):
    one_at_a_time = EngineConfig(max_running_tasks=1, max_queued_tasks=20)
    keys = frozenset({"sk-a", "sk-b"})
    with start_server(engine_config=one_at_a_time, api_keys=keys) as server:
        server.hold()

        def send(key, path="/v1/chat/completions", **body):
            def run():
                headers = {"x-api-key": key}
                httpx2.post(f"{server.url}{path}", json=body, headers=headers, timeout=20)

            thread = threading.Thread(target=run)
            thread.start()
            number = len(threads) + 1
            threads.append(thread)
            server.wait(lambda: server.engine.num_open == number)

        threads: list[threading.Thread] = []
        send("sk-a", messages=HI)  # it runs; the others wait for it
        send("sk-a", "/v1/completions", prompt="bulk")
        for word in ("a1", "a2", "a3"):
            send("sk-a", messages=[{"role": "user", "content": word}])
        send("sk-b", messages=[{"role": "user", "content": "b1"}])
        server.script.go.set()
        for thread in threads:
            thread.join()
        read = [server.tokenizer.decode(task.prompt_ids) for task in server.script.tasks]
    order = [next(w for w in ("hi", "bulk", "a1", "a2", "a3", "b1") if w in text) for text in read]
    assert order == ["hi", "b1", "a1", "a2", "a3", "bulk"]


def logged(server, formatter, act):
    """Lines that an act writes into the log."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.getLogger("astrai_serve.requests")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        act()
        server.wait(lambda: stream.getvalue())
        server.wait_idle()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return stream.getvalue().splitlines()


def test_the_log_tells_of_requests_and_never_their_text(start_server):
    keys = frozenset({"sk-hidden"})
    with start_server(log_requests=True, api_keys=keys) as server:
        server.say(SECRET)
        headers = {"x-api-key": "sk-hidden", "x-request-id": "mine"}
        body = {"messages": [{"role": "user", "content": SECRET}]}

        def ask():
            server.http.post("/v1/chat/completions", json=body, headers=headers)

        (line,) = logged(server, JsonFormatter(), ask)
        told = json.loads(line)
        assert SECRET not in line
        assert "sk-hidden" not in line
        assert (told["request_id"], told["status"], told["path"]) == (
            "mine", 200, "/v1/chat/completions"
        )  # fmt: skip
        assert told["output_tokens"] == len(server.tokenizer.encode(SECRET)) + 1
        assert (told["finish"], told["stream"], len(told["key"])) == ("stop", False, 12)
        assert 0 < told["first_token_seconds"] <= told["seconds"]
        (line,) = logged(server, TextFormatter(), lambda: server.http.get("/nothing"))
        assert "status=401" in line
        assert "path=/nothing" in line


def test_text_is_tokenized_as_a_request_would_be(server):
    text = "你好 hello <|im_end|>"
    told = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert told["tokens"] == server.tokenizer.encode(text, add_special_tokens=True)
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 512)
    assert "".join(told["token_strs"][-9:]).endswith("|im_end|>")
    back = server.http.post("/detokenize", json={"tokens": told["tokens"]}).json()
    assert back == {"prompt": text}
    server.chat("北京")
    body = {"messages": [{"role": "user", "content": "北京"}]}
    shown = server.http.post("/render", json=body).json()
    assert tuple(shown["tokens"]) == server.script.tasks[0].prompt_ids
    assert shown["prompt"] == server.tokenizer.render_chat(body["messages"])
    assert server.http.post("/tokenize", json=body).json()["tokens"] == shown["tokens"]
    info = server.http.get("/tokenizer_info").json()
    assert (info["eos_token"], info["vocab_size"]) == ("<|im_end|>", server.tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/render", {"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_name(server, path, body, param):
    refused = server.http.post(path, json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
