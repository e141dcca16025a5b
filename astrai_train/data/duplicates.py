"""Records that say the same again: exactly, or nearly.

Near duplicates are found by MinHash (Broder 1997) and banding: a record's signature is the smallest
value that each of many hash functions takes over its character n-grams, two records agree in one
entry as often as their sets of n-grams overlap (Jaccard), and only records that agree in a whole
band of entries are compared. Characters and not words, so that Chinese works.

R records; P hash functions.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Duplicates = Literal["keep", "exact", "near"]
Signature = NDArray[np.uint32]

NGRAM = 8
"""Characters of an n-gram."""
THRESHOLD = 0.8
"""Share of n-grams that two records have in common from which one is a near duplicate."""
_BANDS, _ROWS = 16, 8
"""With these a pair at the threshold is compared with a probability of 0.95, one at 0.5 of 0.06."""
_PERMUTATIONS = _BANDS * _ROWS
_PIECE = 4096
"""N-grams that are hashed at a time."""


def _constants() -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    generator = np.random.Generator(np.random.PCG64(0))  # the same on every machine, for ever
    high = 1 << 63
    factors = generator.integers(0, high, _PERMUTATIONS, dtype=np.uint64) * np.uint64(
        2
    ) + np.uint64(1)
    offsets = generator.integers(0, high, _PERMUTATIONS, dtype=np.uint64)
    weights = generator.integers(0, high, NGRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return factors, offsets, weights


_FACTORS, _OFFSETS, _WEIGHTS = _constants()


def text_of(content: Mapping[str, Any]) -> str:
    """All text of a record, one field after the other, with runs of space as one."""
    return " ".join(" ".join(_strings(content)).split())


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield from _strings(value[name])
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _strings(child)
    elif value is not None:
        yield str(value)


def digest(text: str) -> bytes:
    """16 bytes that are the same for the same text only."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def signature(text: str) -> Signature:
    """The MinHash signature (P,) of a text's n-grams; a shorter text is one n-gram."""
    codes = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    codes = codes.astype(np.uint64)
    if len(codes) < NGRAM:
        codes = np.pad(codes, (0, NGRAM - len(codes)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, NGRAM)  # (N, n)
    smallest = np.full(_PERMUTATIONS, np.iinfo(np.uint32).max, dtype=np.uint32)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is what is meant
        for start in range(0, len(windows), _PIECE):
            grams = (windows[start : start + _PIECE] * _WEIGHTS).sum(1, dtype=np.uint64)
            grams ^= grams >> np.uint64(29)
            mixed = grams[:, None] * _FACTORS + _OFFSETS  # (N, P)
            values = (mixed >> np.uint64(32)).astype(np.uint32)
            smallest = np.minimum(smallest, values.min(0))
    return smallest


class Seen:
    """Tells whether a record was there before; the first of its kind always stays."""

    def __init__(self, duplicates: Duplicates) -> None:
        self._near = duplicates == "near"
        self._digests: set[bytes] = set()
        self._signatures: list[Signature] = []
        self._bands: list[defaultdict[bytes, list[int]]] = [
            defaultdict(list) for _ in range(_BANDS)
        ]

    def add(self, digest: bytes, signature: Signature | None = None) -> bool:
        """Take note of a record, given as hashes of its text.

        Args:
            digest: its `digest`.
            signature: its `signature`, needed for near duplicates.

        Returns:
            Whether it is new.
        """
        if digest in self._digests:
            return False
        self._digests.add(digest)
        if not self._near:
            return True
        assert signature is not None
        keys = [band.tobytes() for band in signature.reshape(_BANDS, _ROWS)]
        for bucket, key in zip(self._bands, keys, strict=True):
            for other in bucket.get(key, ()):
                if np.mean(self._signatures[other] == signature) >= THRESHOLD:
                    return False
        number = len(self._signatures)
        self._signatures.append(signature)
        for bucket, key in zip(self._bands, keys, strict=True):
            bucket[key].append(number)
        return True
