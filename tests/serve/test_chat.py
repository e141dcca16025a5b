"""`astrai-chat`: its reading of streams, its conversation, and the program on a terminal."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from astrai_serve.chat import (
    Answer,
    ChatError,
    ChatOptions,
    Client,
    Conversation,
    main,
    printable,
    server_events,
)

COMMAND = Path(sys.executable).parent / "astrai-chat"
HI = [{"role": "user", "content": "hi"}]


def client_for(respond):
    """A client whose every request is answered by a function."""
    return Client(ChatOptions(), httpx2.MockTransport(respond))


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
    assert list(server_events(pieces)) == ["你好\u2028\u0085", "a\nb"]


def test_an_answer_comes_with_its_figures(server, client):
    server.say("你好 😀")
    answer = Answer()
    assert "".join(client.answer(HI, answer)) == "你好 😀"
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


def test_a_conversation_remembers_what_was_said(server, client, capsys):
    talk = Conversation(client, "be brief")
    for line in ("你好", "again"):
        talk.say(line)
    said = [message["content"] for message in talk.prompt()]
    assert said == ["be brief", "你好", "hello", "again", "hello"]
    server.say("other")
    talk.retry()
    assert [message["content"] for message in talk.prompt()][-2:] == ["again", "other"]
    talk.set_system("be long")
    assert talk.prompt() == [{"role": "system", "content": "be long"}]
    assert "hello\n" in capsys.readouterr().out


def test_what_failed_leaves_no_trace(server, client, capsys):
    talk = Conversation(client, "")
    talk.say("hi")
    server.say("crash")
    talk.say("more")
    talk.retry()
    assert [message["content"] for message in talk.messages] == ["hi", "hello"]
    assert "the script broke" in capsys.readouterr().out


def test_what_would_steer_the_terminal_is_left_out():
    assert printable("a\x1b[2Jb\x07\x9b\n\t你😀") == "a[2Jb\n\t你😀"


def test_a_proxy_does_not_stand_before_this_machine(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    client = Client(ChatOptions(url=server.url))
    client.connect()
    assert client.model == "tiny"
    client.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "ftp://x"], "http://"),
        (["--url", "http://a:b"], "--url http://a:b"),
        (["--ulr", "x"], "did you mean --url?"),
        (["--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["--api-key-file", "/none"], "/none does not exist"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code != 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]


def test_a_pipe_gets_the_answer_alone(server, monkeypatch, capsys):
    server.say("好的 😀")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("问题".encode()), "utf-8"))
    main(["--url", server.url, "--system", "be brief"])
    assert capsys.readouterr() == ("好的 😀\n", "")
    prompt = server.tokenizer.decode(server.script.tasks[0].prompt_ids)
    assert "be brief" in prompt
    assert "问题" in prompt


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *arguments):
        self.screen, side = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        command = [COMMAND, *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=side,
            stdout=side,
            stderr=side,
            env=environment,
            start_new_session=True,
            # tests run in the background would hand on that Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(side)
        self.seen = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def expect(self, words):
        """Read until these words have come; what came before them is forgotten."""
        deadline = time.monotonic() + 30
        while words.encode() not in self.seen:
            assert time.monotonic() < deadline, self.seen.decode(errors="replace")
            if select.select([self.screen], [], [], 0.1)[0]:
                self.seen += os.read(self.screen, 4096)
        self.seen = self.seen.split(words.encode(), 1)[1]

    def type(self, text):
        """Press keys."""
        os.write(self.screen, text.encode())


def test_a_chat_on_a_terminal(server):
    with Terminal("--url", server.url) as terminal:
        terminal.expect(f"tiny at {server.url}")
        terminal.expect("> ")
        server.say("你好！😀")
        terminal.type("北京天气\n")
        terminal.expect("你好！😀")
        terminal.expect("tokens")
        assert "北京天气" in server.tokenizer.decode(server.script.tasks[0].prompt_ids)
        terminal.type("/nonsense\n")
        terminal.expect("there is no /nonsense")
        terminal.expect("> ")  # Ctrl-D means something only to a line that is being read
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(server):
    server.say("first words and so on")
    server.hold(at=8)
    with Terminal("--url", server.url) as terminal:
        terminal.expect("> ")
        terminal.type("go\n")
        terminal.expect("first w")
        time.sleep(0.3)  # whoever presses Ctrl-C has read what there is
        terminal.process.send_signal(signal.SIGINT)
        terminal.expect("stopped")
        server.wait_cancelled()
        server.say("second")
        terminal.expect("> ")
        terminal.type("more\n")
        terminal.expect("second")
        assert "fir" in server.tokenizer.decode(server.script.tasks[0].prompt_ids)
        terminal.type("/quit\n")
        assert terminal.process.wait(20) == 0
