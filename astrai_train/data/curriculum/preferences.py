"""Right answers beside wrong ones, for stage dpo.

A wrong answer is the right one with a slip that a small model makes: a carry forgotten, the other
number named, two neighbours out of order, what belongs to another question. The item's own checker
calls the one right and the other wrong.
"""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

from astrai_train.data.curriculum.checker import check
from astrai_train.data.curriculum.generator import TASKS, generate, mixture
from astrai_train.data.curriculum.item import Item, Split
from astrai_train.data.curriculum.numbers import chinese_numeral
from astrai_train.data.curriculum.whole_file import write_lines

_SLIPS = (1, -1, 10, -10)
_INTEGER = re.compile(r"\d+")


def pairs(items: list[Item], seed: int) -> Iterator[dict[str, object]]:
    """Records of stage dpo, one for each item that a slip can be made in.

    Args:
        items: chats that end with a reference reply.
        seed: of the slips.
    """
    rng = Random(f"preferences/{seed}")
    by_task: dict[tuple[str, str], list[str]] = {}
    for item in items:
        by_task.setdefault((item.task, item.language), []).append(item.reply)
    for item in items:
        wrong = _slip(item, by_task[item.task, item.language], rng)
        if wrong is not None:
            yield {
                "prompt": item.messages[:-1],
                "chosen": [item.messages[-1]],
                "rejected": [{"role": "assistant", "content": wrong}],
                "task": item.task,
            }


def write_pairs(out: Path, train: int, val_per_task: int, seed: int) -> tuple[Path, Path]:
    """Write train_pairs.jsonl and val_pairs.jsonl; returns their paths.

    Args:
        out: folder of the files, made when missing.
        train: number of training items to make pairs of.
        val_per_task: number of validation items of each task, the same as in val.jsonl.
        seed: another seed draws other items of the same splits.

    Raises:
        ValueError: `train` is below 1.
    """
    if train < 1:
        raise ValueError(f"pairs={train} must be at least 1.")
    out.mkdir(parents=True, exist_ok=True)
    split: Split = "val"
    val = [item for task in TASKS for item in generate(task, split, val_per_task, seed)]
    # not the items of train.jsonl: those replies are known by heart
    drawn = mixture(train, seed + 1)
    return (
        write_lines(out / "train_pairs.jsonl", map(_line, pairs(drawn, seed))),
        write_lines(out / "val_pairs.jsonl", map(_line, pairs(val, seed))),
    )


def _line(record: dict[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _slip(item: Item, replies: list[str], rng: Random) -> str | None:
    """A reply that the checker calls wrong, or None where no try gives one."""
    for _ in range(20):
        wrong = _try_slip(item, replies, rng)
        if not check(item.checker, wrong):
            return wrong
    return None


def _try_slip(item: Item, replies: list[str], rng: Random) -> str:
    working, newline, last = item.reply.rpartition("\n")
    match item.checker["kind"]:
        case "number":
            right = item.checker["expected"]
            assert isinstance(right, int)
            wrong = max(0, right + rng.choice(_SLIPS))
            is_chinese = item.checker["form"] == "chinese"
            write = chinese_numeral if is_chinese else str
            last = last.replace(write(right), write(wrong))
        case "sequence":
            integers = list(_INTEGER.finditer(last))
            one, other = rng.choice(list(pairwise(integers)))
            between = last[one.end() : other.start()]
            last = last[: one.start()] + other[0] + between + one[0] + last[other.end() :]
        case "text":
            last = rng.choice(replies).rpartition("\n")[2]
        case _:
            named = _INTEGER.findall(last)
            others = set(_INTEGER.findall(item.messages[-2]["content"])) - set(named)
            if item.task == "comparing" and named and others:
                last = last.replace(named[0], rng.choice(sorted(others)))
            else:
                working, newline, last = rng.choice(replies).rpartition("\n")
    return working + newline + last
