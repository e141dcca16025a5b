"""A JSON array item by item, however long it is."""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path

_PIECE = 1 << 20
"""Bytes read at a time."""
_LONGEST_NUMBER = 64
_SPACE = " \t\n\r"


def json_items(path: Path) -> Iterator[tuple[object, int]]:
    """Yield the items of a file that holds one array, and about how many bytes each takes.

    Raises:
        ValueError: the file is no array, not UTF-8, or not JSON; the message says from which item.
    """
    number = 0
    with path.open("rb") as file:
        text = _Text(path, file.read, codecs.getincrementaldecoder("utf-8-sig")())
        if text.next_character() != "[":
            raise ValueError(
                f"{path} must hold a list of records: [{{...}}, ...]; "
                "a file with one record a line is named .jsonl"
            )
        text.skip(1)
        if text.next_character() == "]":
            text.skip(1)
        else:
            while True:
                number += 1
                yield text.value(number)
                mark = text.next_character()
                text.skip(1)
                if mark == "]":
                    break
                if mark != ",":
                    raise ValueError(_not_json(path, f"no comma after item {number}"))
        if text.next_character():
            raise ValueError(_not_json(path, f"there is more after the list of {number} items"))


class _Text:
    """What of the file is read and not yet used."""

    def __init__(
        self, path: Path, read: Callable[[int], bytes], decoder: codecs.IncrementalDecoder
    ) -> None:
        self._path = path
        self._read = read
        self._decode = decoder.decode
        self._text = ""
        self._at = 0
        self._is_whole = False
        self._json = json.JSONDecoder()

    def next_character(self) -> str:
        """The next one that is no space, not used yet; nothing at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_PIECE):
                return ""

    def skip(self, count: int) -> None:
        self._at += count

    def value(self, number: int) -> tuple[object, int]:
        """Use the value that begins at the next character that is no space."""
        self.next_character()
        piece = _PIECE
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except RecursionError:
                raise ValueError(
                    _not_json(self._path, f"item {number} is nested too deeply")
                ) from None
            except json.JSONDecodeError as error:
                # it may only be cut off; twice as much each time, so that the work stays linear
                if not self._more(piece):
                    raise ValueError(
                        _not_json(self._path, f"{error.msg} in item {number}")
                    ) from None
                piece *= 2
                continue
            is_number = isinstance(value, int | float)
            if is_number and len(self._text) - end < _LONGEST_NUMBER and self._more(piece):
                continue  # cut off within its digits it is a number too
            size = len(self._text[self._at : end].encode())
            self._at = end
            return value, size

    def _more(self, count: int) -> bool:
        """Read on; false at the end."""
        if self._is_whole:
            return False
        data = self._read(count)
        self._is_whole = len(data) < count
        try:
            text = self._decode(data, final=self._is_whole)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._path} is not UTF-8 ({error.reason}: {error.object[error.start]:#04x}); "
                "convert it, say: iconv -f gb18030 -t utf-8"
            ) from None
        self._text = self._text[self._at :] + text
        self._at = 0
        return True


def _not_json(path: Path, reason: str) -> str:
    return f"{path} is not JSON: {reason}; a file with one record a line is named .jsonl"
