"""The JSON object of a call, read character by character as the model writes it."""

import json

from astrai_core.tokenizer.incremental_json import JsonScanner
from astrai_core.tokenizer.message_parsing.markup import SPACE

_ARGUMENTS = ("arguments", "parameters")


class CallObject:
    """The JSON object of a call, character by character.

    Args:
        is_bare: nothing marks it as a call, so few keys may come up.
    """

    def __init__(self, is_bare: bool):
        self.name: str | None = None
        self.fresh = ""
        """Text of the arguments that was not taken yet."""
        self.has_arguments = False
        """They are whole."""
        self._is_bare = is_bare
        self._scanner = JsonScanner()
        self._key: str | None = None  # whose value is being read, if it matters
        self._string: str | None = None  # that value, if it is a string

    @property
    def is_complete(self) -> bool:
        """The object is closed."""
        return self._scanner.is_complete

    def take_fresh(self) -> str:
        """Return `fresh` and empty it."""
        fresh, self.fresh = self.fresh, ""
        return fresh

    def feed(self, character: str) -> None:
        """Take a character.

        Raises:
            ValueError: it makes this no call.
        """
        scanner = self._scanner
        if character not in SPACE:
            if scanner.depth == 0 and character != "{":
                raise ValueError("a call is an object")
            if scanner.depth == 1 and scanner.expects_value:
                self._begin_value(scanner.key, character)
        written = scanner.feed(character)
        if self._key is None:
            return
        if self._string is None:
            self.fresh += written
        else:
            self._string += written
        if scanner.depth == 1 and scanner.has_value:
            self._end_value(self._key)

    def _begin_value(self, key: str, character: str) -> None:
        self._key, self._string = None, None
        if key == "name":
            if character != '"' or self.name is not None:
                raise ValueError("a name is a string")
            self._key, self._string = key, ""
        elif key in _ARGUMENTS:
            if character not in '{"n' or self.has_arguments:
                raise ValueError("arguments are an object")
            if character != "n":  # null, as the scanner will see to
                self._key, self._string = key, "" if character == '"' else None
        elif self._is_bare and key not in ("type", "id"):
            raise ValueError("this is another object")

    def _end_value(self, key: str) -> None:
        text = json.loads(self._string) if self._string is not None else None
        self._key, self._string = None, None
        if key == "name":
            if not text or text.isspace():
                raise ValueError("the name is empty")
            text.encode()  # half a surrogate pair is no text
            self.name = text
            return
        if text is not None:  # some models write the arguments as a string of JSON
            self.fresh = _whole_object(text)
        self.has_arguments = True


def _whole_object(text: str) -> str:
    """The text of a JSON object, as it should be written.

    Raises:
        ValueError: it is none.
    """
    text.encode()  # half a surrogate pair is no text
    text = text.strip()
    scanner = JsonScanner()
    written = "".join(map(scanner.feed, text))
    if not (scanner.is_complete and text.startswith("{")):
        raise ValueError("this is no JSON object")
    return written
