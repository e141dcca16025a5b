"""What a completion is worth.

A reward function is called once for a batch of completions, by the names that the field agrees on:

    def function(completions, **columns) -> list[float | None]

`completions` are texts where the prompts are texts, and lists of one assistant message where the
prompts are lists of messages. Beside them come `prompts`, `completion_ids`, and each column of the
records by its name, as lists of the same length. A function takes what it names; one that ends in
`**kwargs` gets all. None means that it cannot judge a completion.

A configuration names functions by import path, and classes with `__call__` where there is
something to set:

    rewards:
      - astrai_train.rewards.checked_answer
      - class_path: astrai_train.rewards.ShortEnough
        init_args: {max_tokens: 64, margin: 16}
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

RewardFunction = Callable[..., Sequence[float | None]]
Completion = str | list[dict[str, str]]


def reward_names(functions: Sequence[RewardFunction]) -> list[str]:
    """A name for each function, to log it by; the second of one name gets a number."""
    names: list[str] = []
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        taken = sum(one == name or one.startswith(f"{name}_") for one in names)
        names.append(f"{name}_{taken + 1}" if name in names else name)
    return names


def judge(
    functions: Sequence[RewardFunction],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    columns: Sequence[Mapping[str, Any]],
) -> Tensor:
    """Ask every function about every completion.

    Args:
        functions: F of them.
        completions: N of them.
        completion_ids: their tokens.
        columns: the record that each completion belongs to, `prompt` among its keys.

    Returns:
        (N, F) float64, NaN for None.

    Raises:
        ValueError: a function asks for a column that there is not, or does not return a number or
            None for each completion.
    """
    names = {name: None for record in columns for name in record}
    given: dict[str, Any] = {
        name: [record.get(name) for record in columns] for name in names if name != "prompt"
    }
    given |= {
        "prompts": [record.get("prompt") for record in columns],
        "completions": list(completions),
        "completion_ids": [list(ids) for ids in completion_ids],
    }
    rewards = [
        _ask(function, name, given, len(completions))
        for function, name in zip(functions, reward_names(functions), strict=True)
    ]
    return torch.tensor(rewards, dtype=torch.float64).view(len(functions), -1).T


def weighted_sum(rewards: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum the functions' rewards (N, F) to (N,); NaN only where no function could judge."""
    total = (rewards * torch.tensor(weights, dtype=rewards.dtype)).nansum(1)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)


def _ask(function: RewardFunction, name: str, given: Mapping[str, Any], count: int) -> list[float]:
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    named = [one for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD]
    missing = [p.name for p in named if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(
            f"the reward function {name} asks for {', '.join(missing)}, but the records have "
            f"{', '.join(sorted(given))} only; add the column to the data"
        )
    wanted = {one.name for one in named}
    answer = function(**{key: value for key, value in given.items() if takes_all or key in wanted})
    if not isinstance(answer, Sequence) or len(answer) != count:
        length = len(answer) if isinstance(answer, Sequence) else type(answer).__name__
        raise ValueError(
            f"the reward function {name} returned {length} for {count} completions; it must return "
            "a list with a number or None for each"
        )
    return [_number(one, name) for one in answer]


def _number(value: object, name: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise ValueError(
        f"the reward function {name} returned {value!r:.40}, which is neither a finite number nor "
        "None"
    )


def text_of(completion: Completion) -> str:
    """The text of a completion, however it is given."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
