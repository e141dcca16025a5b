"""Kinds of characters between which our splitting rule and llama.cpp's `qwen35` may differ."""

import functools

from tokenizers import Regex, normalizers

from astrai_core.tokenizer.byte_pairs import NUMERALS

HAN, OTHER, APART = "han", "other", "apart"
"""Han that stand in runs; what is not Han; numerals, and Han that are no letters."""

_LAST = 0x10FFFF


def kinds_of_last(text: bytes) -> frozenset[str]:
    """Kinds that the last character of a token may have, which begins before the token or in it."""
    start = len(text) - 1
    while start > 0 and text[start] & 0xC0 == 0x80:
        start -= 1
    return _kinds(text[start:], is_start=False)


def kinds_of_first(text: bytes) -> frozenset[str]:
    """Kinds that the first character of a token may have, which ends in the token or after it."""
    end = 1
    while end < len(text) and text[end] & 0xC0 == 0x80:
        end += 1
    return _kinds(text[:end], is_start=True)


@functools.cache
def _kinds(part: bytes, *, is_start: bool) -> frozenset[str]:
    try:
        return frozenset({_kind(part.decode())})
    except UnicodeDecodeError:
        pass  # a part of a character
    fits = bytes.startswith if is_start else bytes.endswith
    return frozenset(
        _kind(character) for character in _all_characters() if fits(character.encode(), part)
    )


@functools.cache
def _all_characters() -> tuple[str, ...]:
    return tuple(chr(code) for code in (*range(0xD800), *range(0xE000, _LAST + 1)))


def _kind(character: str) -> str:
    if character not in _han():
        return OTHER
    return HAN if character in _han_letters() and character not in NUMERALS else APART


@functools.cache
def _han() -> frozenset[str]:
    return frozenset(_only(r"\p{Han}", "".join(_all_characters())))


@functools.cache
def _han_letters() -> frozenset[str]:
    return frozenset(_only(r"[\p{L}\p{M}]", "".join(_han())))


def _only(wanted: str, text: str) -> str:
    """Keep the characters of a class, as the tokenizers library knows it."""
    return normalizers.Replace(Regex(f"[^{wanted}]+"), "").normalize_str(text)
