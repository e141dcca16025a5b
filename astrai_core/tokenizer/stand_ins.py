"""Stand-ins: private-use characters that take the place of control tokens in user text.

A template pastes user text between its own control tokens. Text that spells a control token would
be read as one, so it goes through the template in disguise and gets its own characters back only
after the rendered string was cut at the control tokens that the template itself wrote.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class StandIns:
    """Hides the control tokens in any nesting of strings, lists and dicts, and restores them.

    Halves of a control token at either end of a string are hidden too: templates trim and join
    strings, and two halves would make a whole.
    """

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = sorted(control_tokens, key=len, reverse=True)
        self._whole = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self._heads = {token[:n] for token in tokens for n in range(1, len(token))}
        self._tails = {token[n:] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def hide(self, value: Any) -> tuple[Any, dict[str, str]]:
        """The value in disguise, and what each stand-in character gives back."""
        texts = set(_strings(value))
        if not any(map(self._is_suspect, texts)):
            return value, {}
        taken = set().union(*texts)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        stand_ins: dict[str, str] = {}

        def stand_in(text: str) -> str:
            if text not in stand_ins:
                stand_ins[text] = next(free)
            return stand_ins[text]

        def hide(item: Any) -> Any:
            if isinstance(item, str):
                item = self._whole.sub(lambda match: stand_in(match.group()), item)
                if half := self._head_at_end(item):
                    end = len(item.rstrip())
                    item = item[: end - len(half)] + stand_in(half) + item[end:]
                if half := self._tail_at_start(item):
                    start = len(item) - len(item.lstrip())
                    item = item[:start] + stand_in(half) + item[start + len(half) :]
                return item
            if isinstance(item, Mapping):
                return {hide(key): hide(entry) for key, entry in item.items()}
            if isinstance(item, list | tuple):
                return [hide(entry) for entry in item]
            return item

        return hide(value), {character: text for text, character in stand_ins.items()}

    def cut(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """The rendered string in pieces: (text, False) or (a template's control token, True)."""
        end = 0
        for match in self._whole.finditer(rendered):
            if match.start() > end:
                yield rendered[end : match.start()], False
            yield match.group(), True
            end = match.end()
        if end < len(rendered):
            yield rendered[end:], False

    def _is_suspect(self, text: str) -> bool:
        return bool(
            self._whole.search(text) or self._head_at_end(text) or self._tail_at_start(text)
        )

    def _head_at_end(self, text: str) -> str:
        end = text.rstrip()
        return next((end[-n:] for n in self._lengths(end) if end[-n:] in self._heads), "")

    def _tail_at_start(self, text: str) -> str:
        start = text.lstrip()
        return next((start[:n] for n in self._lengths(start) if start[:n] in self._tails), "")

    def _lengths(self, text: str) -> range:
        return range(min(self._longest - 1, len(text)), 0, -1)


def restore(text: str, originals: Mapping[str, str]) -> str:
    """The text with every stand-in replaced by what it stood for."""
    return text.translate({ord(character): original for character, original in originals.items()})


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _strings(key)
            yield from _strings(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)
