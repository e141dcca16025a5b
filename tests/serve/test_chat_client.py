"""`astrai-chat`'s reading of streams: ours, and those of servers that do things their own way."""

import json

import httpx2
import pytest

from astrai_serve.chat import Answer, ChatError, ChatOptions, Client, Piece
from astrai_serve.chat.events import server_events

HI = [{"role": "user", "content": "hi"}]


def client_for(respond):
    """A client whose every request is answered by a function."""
    return Client(ChatOptions(), httpx2.MockTransport(respond))


def said(pieces, kind="text"):
    """What a stream says, or thinks."""
    return "".join(piece.text for piece in pieces if piece.kind == kind)


@pytest.fixture
def client(server):
    client = Client(ChatOptions(url=server.url))
    client.connect()
    yield client
    client.close()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_events_are_read_however_they_are_cut_and_ended(end, size):
    lines = [
        b": ping",
        b"",
        "data: 你好\u2028\u0085".encode(),
        b"",
        b"data:a",
        b"data: b",
        b"",
        b"",
    ]
    sent = end.join(lines)
    pieces = [sent[start : start + size] for start in range(0, len(sent), size)]
    assert list(server_events(pieces)) == [None, "你好\u2028\u0085", "a\nb"]


def test_an_answer_comes_with_its_figures(server, client):
    server.say("你好 😀")
    answer = Answer()
    assert said(client.answer(HI, answer)) == "你好 😀"
    assert answer.finish_reason == "stop"
    assert str(answer).startswith(f"{answer.usage['completion_tokens']} tokens")


@pytest.mark.parametrize(
    ("respond", "words"),
    [
        (lambda _: httpx2.Response(500, json={"error": {"message": "broken"}}), "500: broken"),
        (lambda _: httpx2.Response(502, text="<html>"), "502: <html>"),
        (lambda _: httpx2.Response(200, text="hello"), "not OpenAI's protocol"),
        (lambda _: httpx2.Response(200, json={"data": []}), "not OpenAI's protocol"),
    ],
)
def test_a_server_that_is_none_is_told_in_words(respond, words):
    with pytest.raises(ChatError, match=words):
        client_for(respond).connect()


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ('data: {"error": {"message": "out of luck"}}\n\n', "out of luck"),
        ('data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "closed the connection"),
        ("data: not json\n\n", "not OpenAI's protocol"),
    ],
)
def test_a_stream_that_breaks_off_is_told_in_words(stream, words):
    client = client_for(lambda _: httpx2.Response(200, text=stream))
    with pytest.raises(ChatError, match=words):
        list(client.answer(HI, Answer()))


FOREIGN = [
    ": comment",
    'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": null}}]}',
    'data: {"choices": [{"delta": {"reasoning_content": "嗯，"}}]}',
    'data: {"choices": [{"delta": {"reasoning": "so"}}]}',
    "event: message",
    'data:{"choices":[{"delta":{"content":"你"}}],"usage":null}',
    'data: {"choices": [{"delta": {"content": "好"}, "finish_reason": "stop"}], "extra": 1}',
    "data: [DONE]",
]


def test_a_stream_of_another_server_is_read():
    body = "".join(f"{line}\r\n\r\n" for line in FOREIGN)
    client = client_for(lambda _: httpx2.Response(200, content=body.encode()))
    answer = Answer()
    pieces = list(client.answer(HI, answer))
    assert pieces[0] == Piece(kind="alive")
    assert said(pieces) == "你好"
    assert said(pieces, "thought") == "嗯，so"
    assert answer.finish_reason == "stop"
    assert str(answer) == ""  # it counts nothing, so nothing is told


def test_a_server_that_knows_no_stream_options_is_asked_without():
    asked = []

    def respond(request):
        asked.append(json.loads(request.content))
        if "stream_options" in asked[-1]:
            return httpx2.Response(400, json={"error": "unknown field stream_options"})
        return httpx2.Response(200, content="\r\n\r\n".join(FOREIGN).encode())

    client = client_for(respond)
    for _ in range(2):
        assert said(client.answer(HI, Answer())) == "你好"
    assert ["stream_options" in body for body in asked] == [True, False, False]


def test_speed_is_measured_here_where_the_server_does_not_tell():
    answer = Answer(usage={"completion_tokens": 11}, began=100.0, ended=102.0)
    assert answer.tokens_per_second == 5
    assert str(answer) == "11 tokens, 5 tokens/s"
    answer.timings = {"predicted_per_second": 7.4}
    assert str(answer) == "11 tokens, 7 tokens/s"


def test_progress_of_a_prompt_is_a_sign_of_life():
    line = 'data: {"choices": [], "prompt_progress": {"processed": 10, "total": 40}}\n\n'
    client = client_for(lambda _: httpx2.Response(200, text=line + "data: [DONE]\n\n"))
    assert list(client.answer(HI, Answer())) == [
        Piece(kind="alive", text="10 of 40 prompt tokens read")
    ]


def test_a_busy_server_tells_when_to_come_back():
    busy = httpx2.Response(
        429, json={"error": {"message": "too many"}}, headers={"retry-after": "7"}
    )
    with pytest.raises(ChatError, match="429: too many; try again in 7 s"):
        list(client_for(lambda _: busy).answer(HI, Answer()))


def test_a_proxy_does_not_stand_before_this_machine(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    client = Client(ChatOptions(url=server.url))
    client.connect()
    assert client.model == "tiny"
    client.close()
