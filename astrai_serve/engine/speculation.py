"""Guesses at what a task will say next, taken from what it has said and read already.

A guess costs a row of the next step. Each row draws its token as if it were alone, and the guesses
hold up to the first one that is not what was drawn in its place: so an answer is the same with and
without them. The method is prompt lookup: what followed the last time the latest tokens stood in
the prompt or the answer. Quotations, code and tables repeat themselves, other text need not; so a
task whose guesses fail makes fewer of them, and then none for a while.
"""

import math
from collections.abc import Sequence

from astrai_serve.engine.task import Task

# How many of the latest tokens are looked up: the longest first, for what follows it is surer.
NGRAMS = (4, 2)
# Tokens of a task that are indexed at most, the latest ones; twice as many for a while.
WINDOW = 4096
# Right guesses a step that a task is believed to have before any was made; twice as many are made.
FIRST_SCORE = 1.0
# Where fewer are right, guessing stops for a while.
LOWEST_SCORE = 0.5
# Tokens said without a guess after guesses have failed; twice as many each time.
SHORTEST_PAUSE = 16
LONGEST_PAUSE = 512


class PromptLookup:
    """The guesses of one task: O(1) a token in the mean, in bounded memory."""

    def __init__(self) -> None:
        self._behind: dict[int, dict[int, int]] = {n: {} for n in NGRAMS}
        """By hash of n tokens, the position behind their last occurrence. Two of one hash make a
        wrong guess and no wrong answer."""
        self._num_indexed = 0
        self._num_kept = 0
        self._score = FIRST_SCORE
        self._pause = SHORTEST_PAUSE
        self._resume_at = 0

    def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """Guess at most `limit` tokens; none where nothing is known or guesses have failed.

        Args:
            token_ids: prompt and answer, which since the last call has only grown.
            limit: at least 1.
        """
        if len(token_ids) < self._resume_at:
            return []
        self._index(token_ids)
        count = min(limit, math.ceil(2 * self._score))
        for n in NGRAMS:
            start = self._behind[n].get(hash(tuple(token_ids[-n:])))
            if start is not None:
                # what runs into the end is a loop, and goes on from its beginning
                loop = token_ids[start : start + count]
                return [loop[i % len(loop)] for i in range(count)]
        return []

    def learn(self, num_tokens: int, num_guessed: int, num_right: int) -> None:
        """Take note of how many guesses were right.

        Args:
            num_tokens: of prompt and answer now.
            num_guessed: guesses of the step.
            num_right: how many were what was drawn.
        """
        if num_right == num_guessed:
            self._score = max(self._score, num_guessed)
            self._pause = SHORTEST_PAUSE
            return
        self._score += (num_right - self._score) / 4
        if self._score < LOWEST_SCORE:
            self._score = LOWEST_SCORE
            self._resume_at = num_tokens + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _index(self, token_ids: Sequence[int]) -> None:
        """Note where n-grams end that something follows: all but those of the last token."""
        if len(token_ids) - self._num_indexed > WINDOW or self._num_kept > 2 * WINDOW:
            for places in self._behind.values():
                places.clear()
            self._num_kept = 0
            self._num_indexed = max(0, len(token_ids) - WINDOW)
        for end in range(self._num_indexed, len(token_ids)):
            for n, places in self._behind.items():
                if end >= n:
                    places[hash(tuple(token_ids[end - n : end]))] = end
        self._num_kept += len(token_ids) - self._num_indexed
        self._num_indexed = len(token_ids)


class Speculation:
    """The guesses of all tasks, and what became of them.

    Args:
        num_tokens: most guesses in a step, shared by the tasks that are answered; so many tasks
            get none. Verifying a few rows costs little where one alone leaves the processor waiting
            for weights, and a full batch does not.
    """

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self._lookups: dict[int, PromptLookup] = {}
        self.num_drafted = 0
        self.num_accepted = 0

    def propose(self, task: Task, limit: int) -> list[int]:
        """Guess at most `limit` of the task's next tokens.

        A task whose form is prescribed gets none: its matcher walks forward only.
        """
        if task.matcher is not None or limit < 1:
            return []
        lookup = self._lookups.get(task.task_id)
        if lookup is None:
            lookup = self._lookups[task.task_id] = PromptLookup()
        draft = lookup.propose(task.token_ids, limit)
        # nothing follows a stop token; it is drawn behind the guess before it
        stops = (n for n, token_id in enumerate(draft) if token_id in task.stop_ids)
        return draft[: next(stops, len(draft))]

    def learn(self, task: Task, num_drafted: int, num_accepted: int) -> None:
        """Take note of what became of a task's guesses."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        if (lookup := self._lookups.get(task.task_id)) is not None:
            lookup.learn(task.num_tokens, num_drafted, num_accepted)

    def forget(self, task: Task) -> None:
        """Drop what is known of a task that has ended."""
        self._lookups.pop(task.task_id, None)

    @property
    def is_idle(self) -> bool:
        """Nothing is remembered of any task."""
        return not self._lookups
