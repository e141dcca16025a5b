"""`astrai-chat` as a program: on a terminal, in a pipe, and started wrongly."""

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyte
import pytest

from astrai_serve.chat import main

COMMAND = Path(sys.executable).parent / "astrai-chat"
ENTER, ALT_ENTER, BACKSPACE = "\r", "\x1b\r", "\x7f"
LEFT, UP, END = "\x1b[D", "\x1b[A", "\x1b[F"


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


def _take_terminal():
    """Make Ctrl-C on the standard input a signal, as at a user's terminal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # tests run in the background would hand on that it is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """The program on a terminal of its own, whose screen is looked at."""

    def __init__(self, *arguments):
        # high enough that nothing scrolls away
        self.screen = pyte.Screen(columns=80, lines=100)
        self._stream = pyte.ByteStream(self.screen)
        self._end, side = pty.openpty()
        termios.tcsetwinsize(side, (100, 80))
        environment = os.environ | {"TERM": "xterm", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            [COMMAND, "--history-file", "null", *arguments],
            stdin=side,
            stdout=side,
            stderr=side,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(side)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self._end)

    @property
    def lines(self):
        """What is on the screen, but for empty lines and spaces at their ends."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def wait(self, condition):
        """Read until the screen is as it should be."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "\n".join(self.lines)
            if select.select([self._end], [], [], 0.1)[0]:
                self._stream.feed(os.read(self._end, 4096))

    def expect(self, words):
        """Wait until these words stand on the screen."""
        self.wait(lambda: words in "\n".join(self.lines))

    def type(self, keys):
        """Press keys."""
        os.write(self._end, keys if isinstance(keys, bytes) else keys.encode())

    def send(self, text):
        """Type a message when the program waits for one."""
        self.wait(lambda: self.lines and self.lines[-1] == ">")
        self.type(text + ENTER)

    def leave(self):
        """End the program from its prompt."""
        self.send("/quit")
        assert self.process.wait(20) == 0


@pytest.fixture
def terminal(server):
    with Terminal("--url", server.url) as terminal:
        yield terminal


def prompts(server, number):
    """What the latest tasks were asked, once there are so many."""
    server.wait(lambda: len(server.script.tasks) == number)
    return [server.tokenizer.decode(task.prompt_ids) for task in server.script.tasks]


def test_a_chat_on_a_terminal(server, terminal):
    terminal.expect(f"tiny at {server.url}")
    server.say("你好！😀")
    terminal.send("北京天气")
    terminal.expect("> 北京天气\n你好！😀\n")
    terminal.expect(" tokens")
    assert "北京天气" in prompts(server, 1)[0]
    terminal.send("/nonsense")
    terminal.expect("there is no /nonsense")
    terminal.wait(lambda: terminal.lines[-1] == ">")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.process.wait(20) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(server, terminal):
    server.say("first words and so on")
    server.hold(at=8)
    terminal.send("go")
    terminal.expect("first w")
    time.sleep(0.3)  # whoever presses Ctrl-C has read what there is
    terminal.type("\x03")
    terminal.expect("stopped")
    server.wait_cancelled()
    server.say("second")
    terminal.send("more")
    terminal.expect("second")
    assert "fir" in prompts(server, 1)[0]
    terminal.leave()


def test_ctrl_c_at_the_prompt_drops_the_line(server, terminal):
    terminal.wait(lambda: terminal.lines[-1:] == [">"])
    terminal.type("never sent")
    terminal.expect("> never sent")
    terminal.type("\x03")
    terminal.expect("Ctrl-D or /quit leaves")
    terminal.send("sent")
    terminal.expect("hello")
    assert "never" not in prompts(server, 1)[0]


def test_wide_characters_are_edited_whole(server, terminal):
    terminal.wait(lambda: terminal.lines[-1:] == [">"])
    for byte in "你们吗".encode():  # as a slow line hands them over
        terminal.type(bytes([byte]))
        time.sleep(0.01)
    terminal.expect("> 你们吗")
    terminal.type(BACKSPACE + LEFT)
    # two columns for the prompt, and two for the one character before the cursor
    terminal.wait(lambda: terminal.lines[-1] == "> 你们" and terminal.screen.cursor.x == 4)
    terminal.type("好")
    terminal.expect("> 你好们")
    terminal.type(END + "！" + ENTER)
    terminal.expect("hello")
    assert "你好们！" in prompts(server, 1)[0]


def test_a_line_of_wide_characters_wraps_between_them(server, terminal):
    text = "汉字" * 30  # 120 columns
    terminal.send(text)
    terminal.expect("hello")
    at = next(index for index, line in enumerate(terminal.lines) if line.startswith("> 汉"))
    assert terminal.lines[at : at + 2] == ["> " + text[:39], "  " + text[39:]]
    assert text in prompts(server, 1)[0]


def test_a_message_of_several_lines(server, terminal):
    terminal.send("一\\" + ENTER + "二" + ALT_ENTER + "三\n四")
    terminal.expect("> 一\n  二\n  三\n  四\nhello")
    assert "一\n二\n三\n四" in prompts(server, 1)[0]
    # what is pasted is one message, whatever it holds
    server.say("pasted")
    terminal.send("\x1b[200~a\nb\rc\x1b[201~")
    terminal.expect("> a\n  b\n  c\npasted")
    assert "a\nb\nc" in prompts(server, 1)[0]


def test_history_comes_back_in_the_next_chat(server, tmp_path):
    path = tmp_path / "deep" / "history"
    options = ("--url", server.url, "--history-file", str(path))
    with Terminal(*options) as terminal:
        terminal.send("北京天气")
        terminal.expect("hello")
        terminal.leave()
    server.say("again")
    with Terminal(*options) as terminal:
        terminal.wait(lambda: terminal.lines[-1:] == [">"])
        terminal.type(UP)
        terminal.expect("> /quit")
        terminal.type(UP)
        terminal.expect("> 北京天气")
        terminal.type(ENTER)
        terminal.expect("again")
    assert "北京天气" in prompts(server, 1)[0]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_history_that_cannot_be_kept_is_told(server, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "history"
    with Terminal("--url", server.url, "--history-file", str(path)) as terminal:
        terminal.expect("what you type is not kept")
        terminal.leave()


def test_commands_on_a_terminal(server, terminal, tmp_path):
    terminal.send("/help")
    for command in ("/system", "/retry", "/save", "/clear", "/quit"):
        terminal.expect(command)
    terminal.send("/system 简短回答")
    terminal.expect("a new conversation")
    terminal.send("问")
    terminal.expect("hello")
    assert "简短回答" in prompts(server, 1)[0]
    server.say("again")
    terminal.send("/retry")
    terminal.expect("again\n")
    assert "hello" not in prompts(server, 1)[0]
    terminal.send(f"/save {tmp_path}/chat.md")
    terminal.expect("saved as")
    assert "**You**\n\n问\n\n**Model**\n\nagain" in (tmp_path / "chat.md").read_text("utf-8")
