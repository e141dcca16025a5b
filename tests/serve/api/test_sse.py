"""The bytes on the wire."""

import json
import re

from astrai_serve.api.sse import event, to_json


def read(server, **body):
    response = server.chat(stream=True, **body)
    assert response.headers["content-type"].startswith("text/event-stream")
    return response.content


def test_each_event_is_one_line_of_data_and_a_blank_one(server):
    server.say("你好 a\u2028b\u0085c\r\nd")
    *events, rest = read(server).split(b"\n\n")
    assert rest == b""
    assert events.pop() == b"data: [DONE]"
    said = ""
    for one in events:
        assert one.startswith(b"data: {")
        assert len(one.decode().splitlines()) == 1  # which many clients split by
        for choice in json.loads(one[6:])["choices"]:
            said += choice["delta"].get("content", "")
    assert said == "你好 a\u2028b\u0085c\r\nd"
    assert "你" in b"".join(events).decode()  # three bytes and not six


def test_all_chunks_of_an_answer_have_one_id_and_one_time(server):
    chunks = server.chunks(server.chat(stream=True, n=2))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["created"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    roles = [chunk["choices"][0] for chunk in chunks[:2]]
    assert [role["index"] for role in roles] == [0, 1]
    assert [role["delta"] for role in roles] == [{"role": "assistant", "content": ""}] * 2
    assert chunks[-1]["choices"][0]["delta"] == {}


def test_pings_come_before_the_first_token(server):
    server.hold(at=0)
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        received = b""
        for piece in response.iter_bytes():
            received += piece
            if received.count(b"ping") >= 2:
                server.script.go.set()
    before_text = received.split(b'"content":"h')[0]
    assert len(re.findall(rb"(?<=\n\n): ping\n\n", before_text)) >= 2
    assert received.endswith(b"data: [DONE]\n\n")


def test_the_official_client_reads_past_pings(server, client):
    server.hold(at=0)
    messages = [{"role": "user", "content": "hi"}]
    stream = client.chat.completions.create(model="tiny", messages=messages, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    server.script.go.wait(0.35)  # three pings
    server.script.go.set()
    said = [choice.delta.content for chunk in stream for choice in chunk.choices]
    assert "".join(filter(None, said)) == "hello"


def test_json_keeps_chinese_and_escapes_what_ends_lines():
    assert to_json({"a": "中\u2028\x85"}) == '{"a":"中\\u2028\\u0085"}'
    assert json.loads(to_json("\u2029中😀\n")) == "\u2029中😀\n"
    assert event(1) == b"data: 1\n\n"
