"""Prompts for stage grpo: chats up to a question, with the checker that judges its answer.

A chat joins several items, so that the question asked is late in it: the later, the further from
what instruction tuning has seen.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from astrai_train.data.curriculum.generator import generate
from astrai_train.data.curriculum.item import SPLITS, Split
from astrai_train.data.curriculum.whole_file import write_lines

# val and held_out have few items that differ
_DISTINCT = 300


def prompts(
    tasks: Sequence[str], split: Split, count: int, joined: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Records of stage grpo: `prompt`, and `checker` and `task` of its last question.

    All items of a chat are of the same split.
    """
    rng = Random(seed)
    size = 2 * count if split == "train" else _DISTINCT
    items = [item for task in tasks for item in generate(task, split, size, seed)]
    for _ in range(count):
        *before, last = rng.sample(items, joined)
        messages = [message for item in before for message in item.messages]
        yield {
            "prompt": [*messages, *last.messages[:-1]],
            "checker": last.checker,
            "task": last.task,
        }


def write_prompts(
    out: Path,
    tasks: Sequence[str],
    train: int = 6000,
    held_out: int = 200,
    joined: int = 3,
    seed: int = 11,
) -> tuple[Path, Path, Path]:
    """Writes train.jsonl, val.jsonl and held_out.jsonl; returns their paths.

    Args:
        out: Folder of the files, made when missing.
        tasks: Which tasks the items are of.
        train: Number of training prompts.
        held_out: Number of prompts of val.jsonl and of held_out.jsonl.
        joined: Items of a chat; only the last question of it is asked.
        seed: Another seed draws other items of the same splits.

    Raises:
        ValueError: a number is below 1, or a task is unknown.
    """
    if min(train, held_out, joined) < 1 or not tasks:
        raise ValueError(
            f"train={train}, held_out={held_out} and joined={joined} must be at least 1, and "
            f"tasks={list(tasks)} must name one"
        )
    out.mkdir(parents=True, exist_ok=True)
    counts = {"train": train, "val": held_out, "held_out": held_out}
    files = [
        write_lines(
            out / f"{split}.jsonl",
            (
                json.dumps(one, ensure_ascii=False)
                for one in prompts(tasks, split, counts[split], joined, seed + number)
            ),
        )
        for number, split in enumerate(SPLITS)
    ]
    return files[0], files[1], files[2]
