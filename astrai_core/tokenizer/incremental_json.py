"""JSON one character at a time: is this still the beginning of a value, and where does it stand?

Parsers of whole values cannot say where a value ends in text that goes on, nor show the first half
of one. This knows nothing of what the values mean, so a megabyte costs a stack of brackets.
"""

import re

_SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LITERALS = ("true", "false", "null")
_ESCAPES = '"\\/bfnrtu'


class JsonScanner:
    """Follows one JSON object or array, from its opening bracket on.

    One thing is forgiven: control characters within strings, which small models write as they are.
    `feed` gives back how they should have been written.
    """

    def __init__(self) -> None:
        self.is_complete = False
        """The bracket that came first is closed."""
        self._closers: list[str] = []
        self._keys: list[str] = []
        self._expects = "value"
        self._word = ""  # of a number or literal, or of the string that is being read
        self._is_key = False
        self._num_hex = 0

    @property
    def depth(self) -> int:
        """Brackets that are open."""
        return len(self._closers)

    @property
    def expects_value(self) -> bool:
        """A value begins with the next character that is no space."""
        return self._expects in ("value", "value or end")

    @property
    def has_value(self) -> bool:
        """A value has just ended; a comma or a closing bracket follows."""
        return self._expects == "comma"

    @property
    def key(self) -> str:
        """The key, as it was written, whose value is being read in the innermost open object."""
        return self._keys[-1]

    def feed(self, character: str) -> str:
        """Take a character and return it as JSON wants it written.

        Raises:
            ValueError: the character cannot stand here; the scanner is of no use any more.
        """
        match self._expects:
            case "string":
                return self._in_string(character)
            case "escape":
                if character not in _ESCAPES:
                    raise ValueError(f"\\{character} is no escape")
                self._word += character
                self._num_hex = 4 if character == "u" else 0
                self._expects = "hex" if self._num_hex else "string"
            case "hex":
                if character not in "0123456789abcdefABCDEF":
                    raise ValueError(f"{character} is no hexadecimal digit")
                self._word += character
                self._num_hex -= 1
                self._expects = "hex" if self._num_hex else "string"
            case "word":
                if character.isascii() and (character.isalnum() or character in "+-."):
                    self._in_word(character)
                else:
                    self._end_word()
                    self._between(character)
            case _:
                self._between(character)
        return character

    def _in_string(self, character: str) -> str:
        if character == '"':
            if self._is_key:
                self._keys[-1] = self._word
            self._expects = "colon" if self._is_key else "comma"
            return character
        if character == "\\":
            self._expects = "escape"
        elif character < " ":
            character = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(
                character, f"\\u{ord(character):04x}"
            )
        self._word += character if self._is_key else ""
        return character

    def _in_word(self, character: str) -> None:
        self._word += character
        is_number = self._word[0] in "-0123456789"
        if not is_number and not any(word.startswith(self._word) for word in _LITERALS):
            raise ValueError(f"{self._word} is no value")

    def _end_word(self) -> None:
        if self._word not in _LITERALS and not _NUMBER.fullmatch(self._word):
            raise ValueError(f"{self._word} is no value")
        self._expects = "comma"

    def _between(self, character: str) -> None:
        if character in _SPACE:
            return
        if self.is_complete:
            raise ValueError(f"{character} stands behind the end")
        expected = self._expects
        if expected == "colon" and character == ":":
            self._expects = "value"
        elif expected == "comma" and character == ",":
            self._expects = "key" if self._closers[-1] == "}" else "value"
        elif expected in ("comma", "key or end", "value or end") and character in "]}":
            if self._closers.pop() != character:
                raise ValueError(f"{character} closes nothing")
            if character == "}":
                self._keys.pop()
            self._expects = "comma"
            self.is_complete = not self._closers
        elif expected in ("key", "key or end") and character == '"':
            self._begin_string(is_key=True)
        elif self.expects_value:
            self._begin_value(character)
        else:
            raise ValueError(f"{character} stands where a {expected} is wanted")

    def _begin_value(self, character: str) -> None:
        if character == "{":
            self._closers.append("}")
            self._keys.append("")
            self._expects = "key or end"
        elif character == "[":
            self._closers.append("]")
            self._expects = "value or end"
        elif not self._closers:
            raise ValueError(f"{character} opens neither an object nor an array")
        elif character == '"':
            self._begin_string(is_key=False)
        else:
            self._expects, self._word = "word", ""
            self._in_word(character)

    def _begin_string(self, is_key: bool) -> None:
        self._expects, self._word, self._is_key = "string", "", is_key
