"""Which tasks there are, how much of each training sees, and items of one of them."""

from collections.abc import Callable
from random import Random

from astrai_train.data.curriculum import (
    arithmetic,
    conversation,
    counting,
    dates,
    follow_up,
    language,
    ordering,
    translation,
    units,
)
from astrai_train.data.curriculum.item import SPLITS, Item, Split

_ITEM: dict[str, Callable[[Random, Split], Item]] = {
    "arithmetic_english": arithmetic.english,
    "arithmetic_chinese": arithmetic.chinese,
    "arithmetic_numerals": arithmetic.numerals,
    "comparing": ordering.compare,
    "sorting": ordering.sort,
    "counting_letters": counting.letters,
    "counting_characters": counting.characters,
    "dates": dates.dates,
    "units": units.convert,
    "translation": translation.translate,
    "asked_language": language.answer_in,
    "follow_up": follow_up.follow_up,
    "greetings": conversation.greetings,
    "identity": conversation.identity,
}

CLOSED_TASKS: tuple[str, ...] = ("greetings", "identity")
"""A few fixed replies; only their wordings can be held out."""

TASKS: tuple[str, ...] = tuple(_ITEM)
"""Every task, the closed ones last."""

WEIGHTS: dict[str, float] = {
    "arithmetic_english": 1.4,
    "arithmetic_chinese": 1.4,
    "arithmetic_numerals": 1.4,
    "comparing": 0.8,
    "sorting": 1.9,
    "counting_letters": 1.4,
    "counting_characters": 1.3,
    "dates": 1.4,
    "units": 0.9,
    "translation": 2.8,
    "asked_language": 2.0,
    "follow_up": 1.2,
    "greetings": 0.25,
    "identity": 0.3,
}
"""Shares of the training mixture: what is learned slowly comes more often."""


# so many known items in a row mean that there are hardly any new ones
_EXHAUSTED = 500


def generate(task: str, split: Split, count: int, seed: int) -> list[Item]:
    """Items of one task, the same for the same arguments.

    Items of `val` and `held_out` are distinct, and a closed task has fewer when its set is
    exhausted. Training may repeat an item.
    """
    if task not in _ITEM:
        raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(TASKS)}.")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    rng = Random(f"{task}/{split}/{seed}")
    if split == "train":
        return [_ITEM[task](rng, split) for _ in range(count)]
    items: dict[str, Item] = {}
    misses = 0
    while len(items) < count and misses < _EXHAUSTED:
        item = _ITEM[task](rng, split)
        known = str(item.messages) in items
        misses = misses + 1 if known else 0
        items.setdefault(str(item.messages), item)
    if len(items) < count and task not in CLOSED_TASKS:
        raise ValueError(
            f"count={count}: {task} has only about {len(items)} distinct {split} items; "
            "ask for fewer."
        )
    return list(items.values())


def mixture(count: int, seed: int) -> list[Item]:
    """Training items of every task in the proportions of `WEIGHTS`, shuffled."""
    total = sum(WEIGHTS.values())
    items = [
        item
        for task, weight in WEIGHTS.items()
        for item in generate(task, "train", round(count * weight / total), seed)
    ]
    Random(seed).shuffle(items)
    return items
