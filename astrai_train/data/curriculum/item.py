"""One chat with a checker, and the rule that decides which operands belong to which split.

The split of an item is a fact about its operands, not about a random draw: the same sum, phrase
or date falls into the same split in every task, language and run.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

T = TypeVar("T")

Split = Literal["train", "val", "held_out"]
Language = Literal["en", "zh"]
Message = dict[str, str]
Checker = dict[str, str | int | list[str] | list[int]]
Operands = tuple[str | int, ...]

SPLITS: tuple[Split, ...] = ("train", "val", "held_out")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A chat that ends with the assistant's reference reply."""

    task: str
    language: Language
    """Language of the reference reply."""
    messages: list[Message]
    checker: Checker
    """Judges the last assistant message from its text alone, see `check`."""
    split: Split
    operands: Operands
    """What the question is about; no two splits share one."""
    wording: str
    """The template of the last question; training and held-out never share one."""

    @property
    def reply(self) -> str:
        """The assistant's reference reply."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Wordings:
    """Ways to ask one thing. `val` asks new operands in the words of training."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def pick(self, rng: Random, split: Split) -> str:
        """A template that this split may use."""
        return rng.choice(self.held_out if split == "held_out" else self.train)


def split_of(*operands: str | int) -> Split:
    """The split that owns these operands: 15 % are held out, 5 % are for validation."""
    digest = hashlib.blake2b("|".join(map(str, operands)).encode(), digest_size=4).digest()
    bucket = int.from_bytes(digest) % 100
    if bucket < 15:
        return "held_out"
    return "val" if bucket < 20 else "train"


def common(*owners: Split) -> Split | None:
    """The split that owns all of several operands, None when they are of different splits."""
    return owners[0] if len(set(owners)) == 1 else None


def draw(split: Split, propose: Callable[[], T], owner: Callable[[T], Split | None]) -> T:
    """Repeats `propose` until the operands belong to the split."""
    for _ in range(100_000):
        candidate = propose()
        if owner(candidate) == split:
            return candidate
    raise AssertionError(f"hardly any operands of these belong to {split}")


def chat(*turns: str) -> list[Message]:
    """Messages from alternating user and assistant texts."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
