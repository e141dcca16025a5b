"""What was said, and the words to steer it."""

import contextlib
import json
import sys
from pathlib import Path

from astrai_serve.chat.client import Answer, ChatError, Client
from astrai_serve.chat.screen import Screen

_SPEAKERS = {"system": "System", "user": "You", "assistant": "Model"}


class Conversation:
    """What was said to a model and what it answered.

    Args:
        client: the server.
        system: the system prompt; empty is none.
        screen: where answers are shown.
    """

    def __init__(self, client: Client, system: str, screen: Screen):
        self.client = client
        self.system = system
        self.screen = screen
        self.messages: list[dict[str, str]] = []
        self.unanswered = ""
        """A message that failed, for another try."""
        self._saved: set[Path] = set()

    def say(self, text: str) -> None:
        """Send a message and show the answer; one that fails leaves no trace but for a retry."""
        if not _is_unicode(text):
            self.screen.note(
                f"that is not {sys.stdin.encoding}: set the terminal to it, or LANG to the terminal"
            )
            return
        self.messages.append({"role": "user", "content": text})
        self.unanswered = ""
        try:
            said = self._show_answer()
        except ChatError as error:
            self.messages.pop()
            self.unanswered = text
            self.screen.note(f"{error} (/retry sends it again)")
        else:
            self.messages.append({"role": "assistant", "content": said})

    def retry(self) -> None:
        """Answer the last message again, or send again what failed."""
        if self.unanswered:
            self.say(self.unanswered)
            return
        if not self.messages:
            self.screen.note("there is nothing to answer again")
            return
        before = self.messages.copy()
        del self.messages[-2:]
        self.say(before[-2]["content"])
        if len(self.messages) < len(before):
            self.messages = before  # the old answer is better than none
            self.unanswered = ""

    def clear(self) -> None:
        """Forget what was said, but not the system prompt."""
        self.messages.clear()
        self.unanswered = ""
        self.screen.note("a new conversation")

    def set_system(self, text: str) -> None:
        """Show the system prompt, or set it and begin anew; a dash takes it away."""
        if not text:
            self.screen.note(self.system or "there is no system prompt")
            return
        self.system = "" if text == "-" else text
        self.clear()

    def save(self, name: str) -> None:
        """Write the conversation to a file: its messages for `.json`, else readable Markdown."""
        path = Path(name).expanduser()
        if not name:
            self.screen.note("/save wants the name of a file: chat.md, or chat.json")
            return
        if path.exists() and path not in self._saved:
            self.screen.note(f"{path} exists; choose another name")
            return
        try:
            path.write_text(self._json() if path.suffix == ".json" else self._markdown(), "utf-8")
        except OSError as error:
            self.screen.note(f"{path} cannot be written: {error.strerror}")
            return
        self._saved.add(path)
        self.screen.note(f"saved as {path}")

    def prompt(self) -> list[dict[str, str]]:
        """All that is sent."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages

    def _json(self) -> str:
        content = {"model": self.client.model, "messages": self.prompt()}
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"

    def _markdown(self) -> str:
        parts = [f"**{_SPEAKERS[one['role']]}**\n\n{one['content']}\n" for one in self.prompt()]
        return "\n".join(parts)

    def _show_answer(self) -> str:
        answer, said = Answer(), ""
        screen = self.screen
        screen.begin()
        try:
            # closed also when Ctrl-C breaks the loop, so that the server stops as well
            with contextlib.closing(self.client.answer(self.prompt(), answer)) as pieces:
                for piece in pieces:
                    if piece.kind == "text":
                        said += piece.text  # first: what was seen is what is remembered
                    screen.show(piece)
        except KeyboardInterrupt:
            screen.end()
            screen.note("stopped")
            return said
        except ChatError:
            screen.end()
            raise
        screen.end()
        if told := str(answer):
            screen.note(told)
        return said


def _is_unicode(text: str) -> bool:
    """Whether the terminal sent what Python could decode."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
