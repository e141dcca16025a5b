"""The bytes behind each token, which a token of half a character cannot show as text."""

import json
from collections.abc import Callable

from tokenizers import Tokenizer


def speller(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    """How a token of this vocabulary spells its bytes."""
    # its part of tokenizer.json, without the vocabulary
    decoder = {} if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    kinds = {part["type"] for part in [decoder, *decoder.get("decoders", [])]} if decoder else set()
    if "ByteLevel" in kinds:
        byte_of = byte_level_alphabet()

        def spell_bytes(text: str) -> bytes:
            try:
                return bytes(map(byte_of.__getitem__, text))
            except KeyError:  # nothing of that alphabet: the library takes such a token as it is
                return text.encode()

        return spell_bytes
    if kinds & {"ByteFallback", "Metaspace"}:

        def spell_text(text: str) -> bytes:
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                return bytes([int(text[3:5], 16)])
            return text.replace("▁", " ").encode()

        return spell_text
    raise ValueError(f"cannot tell the bytes of tokens with the decoder {decoder.get('type')}")


def byte_level_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for.

    Printable Latin-1 bytes stand for themselves, the others take the code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }
