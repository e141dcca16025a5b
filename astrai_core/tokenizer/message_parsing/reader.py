"""The incremental part of parsing: characters in, at any cut, and deltas out.

A reading is a generator that waits for its next character at each `yield`, so that a grammar is
written as plain code though the text comes in pieces.
"""

import contextlib
from collections.abc import Callable, Generator

from astrai_core.tokenizer.message_parsing.deltas import (
    ContentText,
    Delta,
    ReasoningText,
    ToolCallArguments,
)
from astrai_core.tokenizer.message_parsing.markup import SPACE

NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
MAX_NAME = 256
Reading = Generator[None, str, None]


class EndOfTextError(Exception):
    """The text is over."""


class MalformedError(Exception):
    """This is no call: all that was read is text.

    Args:
        again: the last character may begin something else.
    """

    def __init__(self, again: bool = True):
        self.again = again


class AnswerReader:
    """Steps through one answer; subclasses say what is in it by `_read`.

    It reads one character after another, holds back what may yet turn out to be markup, and
    collects deltas.
    """

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._again: list[str] = []  # characters to read again, the next one last
        self._pending: list[str] = []  # read as parts of a call and not yet told
        self._ended = False
        self._after_call = False
        self.num_characters = 0
        """Characters fed so far."""
        self._reading = self._read()
        next(self._reading)

    def _read(self) -> Reading:
        """Read the whole answer; ends with the text."""
        raise NotImplementedError

    def feed(self, text: str) -> list[Delta]:
        """Take more text and return what it makes certain."""
        for character in text:
            self.num_characters += 1
            self._reading.send(character)
        return self._take_deltas()

    def finish(self) -> list[Delta]:
        """Return what was held back, for nothing follows."""
        self._ended = True
        with contextlib.suppress(StopIteration):
            self._reading.send("")
        return self._take_deltas()

    def _take_deltas(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _next(self) -> Generator[None, str, str]:
        """The next character.

        Raises:
            EndOfTextError: there is none.
        """
        if self._again:
            return self._again.pop()
        character = "" if self._ended else (yield)
        if self._ended:
            raise EndOfTextError
        return character

    def _unread(self, text: str) -> None:
        self._again += reversed(text)

    def _begins_with(self, mark: str) -> Generator[None, str, bool]:
        """Whether the text, but for space, begins with a mark, which is read then."""
        read = ""
        while True:
            try:
                read += yield from self._next()
            except EndOfTextError:
                self._unread(read)
                return False
            if (begun := read.lstrip(SPACE)) == mark:
                return True
            if not mark.startswith(begun):
                self._unread(read)
                return False

    def _skip(self, space: str) -> Reading:
        while (character := (yield from self._next())) in space:
            pass
        self._unread(character)

    def _text_until(
        self, mark: str, emit: Callable[[str], None], space: str
    ) -> Generator[None, str, str]:
        """Emit text up to a mark and the space before it, which is returned."""
        held, begun = "", ""  # space, and what of the mark has come
        while begun != mark:
            try:
                character = yield from self._next()
            except EndOfTextError:
                self._release(emit, held + begun)
                raise
            if mark.startswith(begun + character):
                begun += character
            elif not begun and character in space:
                held += character
            else:
                # of a mark, only its first character may begin it anew
                emit(held + begun)
                held, begun = "", ""
                if mark.startswith(character):
                    begun = character
                elif character in space:
                    held = character
                else:
                    emit(character)
        return held

    def _take(self) -> Generator[None, str, str]:
        """The next character, as part of a call."""
        character = yield from self._next()
        self._pending.append(character)
        return character

    def _take_after_space(self) -> Generator[None, str, str]:
        while (character := (yield from self._take())) in SPACE:
            pass
        return character

    def _take_name(self, mark: str) -> Generator[None, str, str]:
        """A name up to a mark."""
        name = ""
        while not name.endswith(mark):
            name += yield from self._take()
            if name[-1] not in NAME_CHARACTERS and name[-1] not in mark + SPACE:
                raise MalformedError
            if len(name) > MAX_NAME:
                raise MalformedError
        return name.removesuffix(mark)

    def _expect(self, *marks: str, keep: bool = False) -> Generator[None, str, str]:
        """Read one of these, after space.

        Args:
            marks: what may come.
            keep: it is not known yet whether it belongs to a call.
        """
        mark = yield from self._take_after_space()
        while mark not in marks:
            if not any(known.startswith(mark) for known in marks):
                raise MalformedError
            mark += yield from self._take()
        if not keep:
            self._pending = []
        return mark

    def _tell(self, delta: Delta) -> None:
        """Add a delta, or more text to the last one."""
        last = self._deltas[-1] if self._deltas else None
        match last, delta:
            case (ReasoningText(), ReasoningText()) | (ContentText(), ContentText()):
                self._deltas[-1] = type(delta)(last.text + delta.text)
            case ToolCallArguments(), ToolCallArguments():
                self._deltas[-1] = ToolCallArguments(delta.index, last.text + delta.text)
            case _:
                self._deltas.append(delta)

    def _think(self, text: str) -> None:
        if text:
            self._tell(ReasoningText(text))

    def _say(self, text: str) -> None:
        if text:
            self._tell(ContentText(text))
            self._after_call = False

    def _release(self, emit: Callable[[str], None], text: str) -> None:
        """Emit what was held back; space behind a call is markup like that between calls."""
        if not (self._after_call and text.isspace()):
            emit(text)
