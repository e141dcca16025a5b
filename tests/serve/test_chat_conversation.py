"""`astrai-chat`'s conversation: what is remembered, shown and saved."""

import io
import json

import pytest

from astrai_serve.chat import ChatOptions, Client, Conversation, Piece
from astrai_serve.chat.screen import Screen, printable


@pytest.fixture
def client(server):
    client = Client(ChatOptions(url=server.url))
    client.connect()
    yield client
    client.close()


class Paper(io.StringIO):
    """A terminal that keeps what was written."""

    def isatty(self):
        return True


def test_a_conversation_remembers_what_was_said(server, client, capsys):
    talk = Conversation(client, "be brief", Screen())
    for line in ("你好", "again"):
        talk.say(line)
    said = [message["content"] for message in talk.prompt()]
    assert said == ["be brief", "你好", "hello", "again", "hello"]
    server.say("other")
    talk.retry()
    assert [message["content"] for message in talk.prompt()][-2:] == ["again", "other"]
    talk.set_system("be long")
    assert talk.prompt() == [{"role": "system", "content": "be long"}]
    talk.set_system("-")
    assert talk.prompt() == []
    assert "hello\n" in capsys.readouterr().out


def test_what_failed_leaves_no_trace(server, client, capsys):
    talk = Conversation(client, "", Screen())
    talk.say("hi")
    server.say("crash")
    talk.say("more")
    talk.retry()
    assert [message["content"] for message in talk.messages] == ["hi", "hello"]
    assert "the script broke" in capsys.readouterr().out


def test_what_failed_is_sent_again(server, client, capsys):
    talk = Conversation(client, "", Screen())
    server.say("crash")
    talk.say("你好")
    assert talk.messages == []
    server.say("hello")
    talk.retry()
    assert [message["content"] for message in talk.messages] == ["你好", "hello"]
    assert "/retry sends it again" in capsys.readouterr().out


def test_a_conversation_is_saved_and_nothing_is_overwritten(client, tmp_path, capsys):
    talk = Conversation(client, "be brief", Screen())
    talk.say("你好")
    talk.save(str(tmp_path / "chat.md"))
    written = (tmp_path / "chat.md").read_text("utf-8")
    assert written == "**System**\n\nbe brief\n\n**You**\n\n你好\n\n**Model**\n\nhello\n"
    talk.save(str(tmp_path / "chat.json"))
    saved = json.loads((tmp_path / "chat.json").read_text("utf-8"))
    assert saved == {"model": "tiny", "messages": talk.prompt()}
    talk.say("more")
    talk.save(str(tmp_path / "chat.md"))  # its own file grows with it
    assert "more" in (tmp_path / "chat.md").read_text("utf-8")
    (tmp_path / "other").write_text("mine")
    for name in ("other", "none/chat.md", "."):
        talk.save(str(tmp_path / name))
    talk.save("")
    assert (tmp_path / "other").read_text() == "mine"
    told = capsys.readouterr().out
    for words in ("exists; choose another", "cannot be written: No such", "wants the name"):
        assert words in told


def test_thoughts_are_dim_and_apart_from_the_answer():
    paper = Paper()
    screen = Screen(paper)
    screen.begin()
    screen.show(Piece(kind="thought", text="so\x1b[2J"))
    screen.show(Piece(kind="text", text="82"))
    screen.show(Piece(kind="alive"))
    screen.show(Piece(kind="text", text="!"))
    screen.end()
    assert paper.getvalue() == "\x1b[2mso[2J\x1b[0m\n\n82!\n"


def test_the_wait_for_a_long_prompt_is_told_and_taken_away():
    paper = Paper()
    screen = Screen(paper)
    screen.begin()
    screen.show(Piece(kind="alive", text="1 of 4 prompt tokens read"))
    screen.show(Piece(kind="text", text="hi"))
    screen.end()
    status, text = paper.getvalue().removeprefix("\r\x1b[K").split("\r\x1b[K")
    assert status == "\x1b[2mwaiting, 0 s, 1 of 4 prompt tokens read\x1b[0m"
    assert text == "hi\n"


def test_what_would_steer_the_terminal_is_left_out():
    assert printable("a\x1b[2Jb\x07\x9b\n\t你😀") == "a[2Jb\n\t你😀"
