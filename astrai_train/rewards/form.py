"""Rewards for how an answer is written, whatever it says."""

import re
from collections.abc import Sequence

from astrai_train.data.curriculum.checker import conclusion
from astrai_train.rewards.judging import Completion, text_of


def has_conclusion(completions: Sequence[Completion], **_: object) -> list[float | None]:
    """1 where a completion ends with `The answer is X.` or `答案是X。`, said once."""
    return [float(conclusion(text_of(completion)) is not None) for completion in completions]


class ShortEnough:
    """0 up to some length, then falling to -1 at the longest that is wanted, and -1 beyond.

    Args:
        max_tokens: where -1 is reached.
        margin: tokens before it in which the reward falls.
    """

    def __init__(self, max_tokens: int, margin: int) -> None:
        if not 0 < margin <= max_tokens:
            raise ValueError(
                f"margin of ShortEnough must be from 1 to max_tokens {max_tokens}, not {margin}"
            )
        self.max_tokens, self.margin = max_tokens, margin

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: object) -> list[float | None]:
        """Judge by the number of tokens alone."""
        begin = self.max_tokens - self.margin
        return [-min(max(len(ids) - begin, 0), self.margin) / self.margin for ids in completion_ids]


class Matches:
    """1 where a completion matches a pattern from end to end.

    Args:
        pattern: a regular expression; its dot matches line ends too.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} of Matches: {error}") from None

    def __call__(self, completions: Sequence[Completion], **_: object) -> list[float | None]:
        """Judge by form alone."""
        return [float(bool(self._pattern.fullmatch(text_of(one).strip()))) for one in completions]
