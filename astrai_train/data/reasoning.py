"""Tasks of `reasoning_gym` as prompts for stage grpo, and the scores of their answers.

The package is an extra, and is imported where a task is made or scored.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

INSTRUCTION = "Give your final answer between <answer> and </answer>."
"""Follows every question; what stands between the tags is scored."""

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reasoning_records(
    tasks: Sequence[str], count: int, seed: int = 0, instruction: str = INSTRUCTION
) -> Iterator[dict[str, Any]]:
    """Records of stage grpo: `prompt`, `answer` and `entry`, which the scorer needs.

    Args:
        tasks: names of `reasoning_gym` data sets, which take turns.
        count: number of records.
        seed: another one makes others.
        instruction: said after each question.

    Raises:
        ValueError: there is no such task, or what it needs to score an answer is not JSON.
        ValueError: the package is not installed.
    """
    gym = _gym()
    unknown = [task for task in tasks if task not in gym.factory.DATASETS]
    if unknown or not tasks:
        raise ValueError(
            f"reasoning_gym has no task {', '.join(unknown) or '(none given)'}; it has "
            f"{', '.join(sorted(gym.factory.DATASETS))}"
        )
    size = -(-count // len(tasks))
    sets = [gym.create_dataset(task, size=size, seed=seed) for task in tasks]
    for number in range(count):
        item = sets[number % len(tasks)][number // len(tasks)]
        entry = json.loads(json.dumps(item, ensure_ascii=False, default=str))
        if score(str(item["answer"]), entry) < score_of(item):
            raise ValueError(
                f"the task {tasks[number % len(tasks)]} cannot be used: what it scores answers by "
                "does not survive being written as JSON"
            )
        content = f"{item['question'].strip()}\n{instruction}".strip()
        yield {
            "prompt": [{"role": "user", "content": content}],
            "answer": str(item["answer"]),
            "entry": entry,
        }


def score(answer: str, entry: Mapping[str, Any]) -> float:
    """What an answer to a record's entry is worth, from 0 to 1."""
    return float(_scorer(entry["metadata"]["source_dataset"]).score_answer(answer, entry))


def score_of(entry: Mapping[str, Any]) -> float:
    """What the reference answer is worth."""
    return score(entry["answer"], entry)


def tagged_answer(text: str) -> str | None:
    """What stands between the last `<answer>` and `</answer>`, None without them."""
    found = _TAGGED.findall(text)
    return found[-1].strip() if found else None


@cache
def _scorer(task: str) -> Any:
    return _gym().create_dataset(task, size=1, seed=0)


def _gym() -> ModuleType:
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError(
            "reasoning tasks need the package reasoning-gym: pip install 'astrai[reasoning]'"
        ) from None
    return reasoning_gym
