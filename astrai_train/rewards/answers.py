"""Rewards for what an answer says."""

from collections.abc import Mapping, Sequence
from typing import Any

from astrai_train.data.curriculum.checker import check, conclusion, normalise
from astrai_train.data.reasoning import score, tagged_answer
from astrai_train.rewards.judging import Completion, text_of


def checked_answer(
    completions: Sequence[Completion], checker: Sequence[dict[str, Any]], **_: object
) -> list[float | None]:
    """1 where the record's checker calls the completion right; see `curriculum.checker`."""
    return [
        float(check(one, text_of(completion)))
        for one, completion in zip(checker, completions, strict=True)
    ]


def final_answer(
    completions: Sequence[Completion], answer: Sequence[str], **_: object
) -> list[float | None]:
    """1 where what follows `The answer is` or `答案是` on the last line is the record's `answer`.

    A completion without such a line is its own answer. Both are normalised: width, case, quotation
    marks and full stops do not count.
    """
    rewards: list[float | None] = []
    for completion, wanted in zip(completions, answer, strict=True):
        said = conclusion(text_of(completion))
        said = normalise(text_of(completion)) if said is None else said
        rewards.append(float(said == normalise(str(wanted))))
    return rewards


def reasoning_gym_score(
    completions: Sequence[Completion], entry: Sequence[Mapping[str, Any]], **_: object
) -> list[float | None]:
    """What `reasoning_gym` gives for an answer to a record of `astrai-data reasoning`, 0 to 1.

    The answer is what the prompt asks for: the text of the last `<answer>` tag. Without one there
    is no answer, and the score is 0.
    """
    return [
        0.0 if (said := tagged_answer(text_of(completion))) is None else score(said, one)
        for completion, one in zip(completions, entry, strict=True)
    ]
