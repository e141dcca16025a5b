"""Records that say the same again: exactly, or nearly.

Near duplicates are found by MinHash (Broder 1997) and banding: a record's signature is the smallest
value that each of many hash functions takes over its character n-grams, two records agree in one
entry as often as their sets of n-grams overlap (Jaccard), and only records that agree in a whole
band of entries are compared. Characters and not words, so that Chinese works.

R records; P hash functions.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
_DIGEST = 16
"""Bytes of a digest."""
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
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()


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


class Digests:
    """A set of digests in 16 bytes each: sorted arrays, each twice as long as the next or longer.

    They are merged as they grow, so that there are few of them and each value is moved seldom; a
    Python set takes six times as much.
    """

    def __init__(self) -> None:
        self._runs: list[NDArray[np.bytes_]] = []

    def add(self, digests: Sequence[bytes]) -> NDArray[np.bool_]:
        """Take note of some, and tell of each whether it is new (N,)."""
        new = np.zeros(len(digests), dtype=np.bool_)
        # compared as strings of 16 bytes, which numpy pads with the zeros that it strips
        found, first = np.unique(np.array(digests, dtype=f"S{_DIGEST}"), return_index=True)
        is_known = np.zeros(len(found), dtype=np.bool_)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, found), len(run) - 1)
            is_known |= run[places] == found
        new[first[~is_known]] = True
        fresh = found[~is_known]
        if len(fresh):
            self._runs.append(fresh)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.concatenate([self._runs[-1], last])
            self._runs[-1].sort(kind="stable")
        return new


class Seen:
    """Tells whether a record was there before; the first of its kind always stays."""

    def __init__(self, duplicates: Duplicates) -> None:
        self._near = duplicates == "near"
        self._digests = Digests()
        self._signatures: list[Signature] = []
        self._bands: list[defaultdict[bytes, list[int]]] = [
            defaultdict(list) for _ in range(_BANDS)
        ]

    def add(self, marks: Sequence[tuple[bytes, Signature | None]]) -> NDArray[np.bool_]:
        """Take note of some records, given as hashes of their text.

        Args:
            marks: of each its `digest` and its `signature`, needed for near duplicates.

        Returns:
            Which of them are new (N,).
        """
        new = self._digests.add([digest for digest, _ in marks])
        if self._near:
            for number in np.flatnonzero(new).tolist():
                mark = marks[number][1]
                assert mark is not None
                new[number] = self._is_unlike_all(mark)
        return new

    def _is_unlike_all(self, signature: Signature) -> bool:
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
