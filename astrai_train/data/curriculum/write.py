"""The curriculum as JSONL files: train, val and held_out.

Training also asks several unrelated items in one chat, for that is what people do; without it a
model takes every later question for one about the first. The items of val and held_out stand alone,
so that their figures are about the task.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

from astrai_train.data.curriculum.generator import TASKS, generate, mixture
from astrai_train.data.curriculum.item import Item
from astrai_train.data.curriculum.whole_file import write_lines

VAL_PER_TASK = 40
MAX_JOINED = 3


def record(item: Item) -> dict[str, object]:
    """What a line of the files holds."""
    return {
        "messages": item.messages,
        "task": item.task,
        "language": item.language,
        "checker": item.checker,
    }


def conversations(items: Sequence[Item], seed: int) -> Iterator[Item]:
    """Join items into chats of one to `MAX_JOINED`, every number of them as often.

    A joined chat has the checker of its last item.
    """
    rng = Random(f"conversations/{seed}")
    rest = iter(items)
    for first in rest:
        joined = first
        for _ in range(rng.randint(0, MAX_JOINED - 1)):
            following = next(rest, None)
            if following is None:
                break
            messages = [*joined.messages, *following.messages]
            joined = dataclasses.replace(following, messages=messages)
        yield joined


def write_curriculum(
    out: Path, train: int = 80_000, held_out: int = 200, seed: int = 0
) -> tuple[Path, Path, Path]:
    """Writes train.jsonl, val.jsonl and held_out.jsonl; returns their paths.

    Args:
        out: Folder of the files, made when missing.
        train: Number of training items, spread over the tasks by `WEIGHTS`; a chat holds one or
            several.
        held_out: Number of held-out chats of each task; closed sets may have fewer.
        seed: Another seed draws other items of the same splits.
    """
    if train < 1 or held_out < 1:
        raise ValueError(f"train={train} and held_out={held_out} must both be at least 1.")
    out.mkdir(parents=True, exist_ok=True)
    val_items = [item for task in TASKS for item in generate(task, "val", VAL_PER_TASK, seed)]
    held_out_items = [item for task in TASKS for item in generate(task, "held_out", held_out, seed)]
    return (
        _write(out / "train.jsonl", conversations(mixture(train, seed), seed)),
        _write(out / "val.jsonl", val_items),
        _write(out / "held_out.jsonl", held_out_items),
    )


def _write(path: Path, items: Iterable[Item]) -> Path:
    return write_lines(path, (json.dumps(record(item), ensure_ascii=False) for item in items))
