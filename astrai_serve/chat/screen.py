"""What the user sees: answers as they come, thoughts and notes in dim letters."""

import sys
import time
from typing import TextIO

from astrai_serve.chat.client import Piece

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CLEAR_LINE = "\r\x1b[K"


def printable(text: str) -> str:
    """Leave out what would steer the terminal; a model may write anything."""
    return "".join(c for c in text if c in "\n\t" or not ("\x7f" <= c <= "\x9f" or c < " "))


class Screen:
    """Writes to a terminal, or to whatever stands in its place.

    Args:
        out: where to; the standard output by default.
    """

    def __init__(self, out: TextIO | None = None):
        self._out = out or sys.stdout
        self._is_terminal = self._out.isatty()
        self._shown = ""
        """What the line on the screen holds: nothing, a status, a thought or text."""
        self._began = 0.0

    def begin(self) -> None:
        """Wait for an answer."""
        self._shown, self._began = "", time.monotonic()

    def show(self, piece: Piece) -> None:
        """Show what has come."""
        if piece.kind == "alive":
            self._show_status(piece.text)
            return
        text = printable(piece.text)
        if self._shown == "alive":
            self._out.write(_CLEAR_LINE)
        if piece.kind == "text" and self._shown == "thought":
            self._out.write("\n\n")
        self._out.write(self._dim(text) if piece.kind == "thought" else text)
        self._out.flush()
        self._shown = piece.kind

    def end(self) -> None:
        """Leave the answer's last line."""
        if self._shown == "alive":
            self._out.write(_CLEAR_LINE)
        elif self._shown:
            self._out.write("\n")
        self._out.flush()
        self._shown = ""

    def note(self, text: str) -> None:
        """Say something that is not the model's."""
        self._out.write(self._dim(printable(text)) + "\n")
        self._out.flush()

    def _show_status(self, told: str) -> None:
        # once there is text, it says by itself that the server lives
        if not self._is_terminal or self._shown not in ("", "alive"):
            return
        waited = f"{time.monotonic() - self._began:.0f} s"
        status = ", ".join(filter(None, ("waiting", waited, printable(told))))
        self._out.write(_CLEAR_LINE + self._dim(status))
        self._out.flush()
        self._shown = "alive"

    def _dim(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._is_terminal else text
