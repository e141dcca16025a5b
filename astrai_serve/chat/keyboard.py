"""The line editor: history, several lines, and characters that are two columns wide."""

import os
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


class Keyboard:
    """Reads what the user types.

    Args:
        history_file: keeps it for the next time; None keeps it in memory only.
    """

    def __init__(self, history_file: Path | None):
        # the editor would ask the terminal where its cursor is; some never answer
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        self._session: PromptSession[str] = PromptSession(
            history=_history(history_file),
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation="  ",
            enable_open_in_editor=True,
        )

    def read(self) -> str:
        """Return a message.

        Raises:
            KeyboardInterrupt: Ctrl-C dropped it.
            EOFError: Ctrl-D on an empty line.
        """
        return self._session.prompt("> ")


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    path.parent.mkdir(parents=True, exist_ok=True)
    # what was said to a model is nobody else's business
    os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))
    return FileHistory(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send_or_go_on(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\" and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")  # Alt+Enter
    @keys.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
