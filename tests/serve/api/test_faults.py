"""Faults of the engine as a client sees them: in-band, told by the health check, and over again."""

import json


def test_a_broken_step_is_an_event_in_the_stream_and_the_next_request_is_answered(server):
    server.say("crash")
    response = server.chat(stream=True)
    assert response.status_code == 200, "the stream had begun"
    last = response.text.strip().split("\n\n")[-1].removeprefix("data: ")
    error = json.loads(last)["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "RuntimeError: the script broke" in error["message"]
    whole = server.chat()
    assert (whole.status_code, whole.headers["x-should-retry"]) == (500, "false")
    assert server.http.get("/health").status_code == 200
    server.say("hello")
    assert server.chat().json()["choices"][0]["message"]["content"] == "hello"


def test_a_dead_engine_ends_its_streams_and_turns_health_bad(start_server, monkeypatch):
    with start_server() as server:
        server.say("hello")
        server.hold()
        with server.http.stream(
            "POST", "/v1/completions", json={"prompt": "hi", "stream": True, "max_tokens": 200}
        ) as response:
            monkeypatch.setattr(server.engine._core.scheduler, "complete", None)
            server.script.go.set()
            text = response.read().decode()
        assert "the engine failed" in text
        assert '"error"' in text
        assert server.http.get("/health").status_code == 503
        refused = server.complete()
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "engine_closed")
