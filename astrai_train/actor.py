"""The policy at work: it answers prompts through an engine, and its answers are judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from astrai_core.generation import Completion, FinishReason, GenerationEngine
from astrai_core.model import Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.policy_copy import PolicyCopy, Rounding
from astrai_train.rewards import RewardFunction, judge, reward_names, weighted_sum

EngineFactory = Callable[[Transformer], GenerationEngine]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """N completions and what they are worth."""

    completions: list[Completion]
    texts: list[str]
    """What the completions say, without the token that ended them."""
    scores: Tensor
    """(N, F) float64, each function's reward; NaN where it could not judge."""
    rewards: Tensor
    """(N,) float64, their weighted sum."""
    engine_steps: int
    """Steps that the engine took for them."""
    prefix_hits: int
    """Prompt tokens that it had computed for another of them."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each, (N,)."""
        return torch.tensor([len(one.token_ids) for one in self.completions], dtype=torch.int64)

    @property
    def is_truncated(self) -> Tensor:
        """Which did not end by themselves, (N,) bool."""
        return torch.tensor(
            [one.finish_reason is FinishReason.LENGTH for one in self.completions],
            dtype=torch.bool,
        )


class Actor:
    """Answers and judges.

    Args:
        factory: makes the engine, when it is first needed.
        rewards: judge completions.
        weights: of the rewards, in their sum.
        rounding: of the weights that answer.
    """

    def __init__(
        self,
        factory: EngineFactory,
        rewards: Sequence[RewardFunction],
        weights: Sequence[float],
        rounding: Rounding | None = None,
    ) -> None:
        self._factory = factory
        self._rounding: Rounding | None = rounding
        self._engine: GenerationEngine | None = None
        self._copy: PolicyCopy | None = None
        self._rewards = rewards
        self._weights = weights
        self.reward_names = reward_names(rewards)
        """A name for each reward."""

    def answer(
        self,
        model: Transformer,
        tokenizer: AutoTokenizer,
        columns: Sequence[Mapping[str, Any]],
        complete: Callable[[GenerationEngine], list[Completion]],
    ) -> Answers:
        """Answer prompts and judge the answers.

        Args:
            model: the policy.
            tokenizer: turns completions into text.
            columns: the record of each prompt; a prompt answered several times has it as often.
            complete: asks the engine.

        Raises:
            ValueError: a prompt leaves no room for an answer.
        """
        if self._engine is None or self._copy is None:
            self._copy = PolicyCopy(model, self._rounding)
            self._engine = self._factory(self._copy.model)
        else:
            self._copy.follow(model)
        before = dict(self._engine.stats())
        try:
            # the copy is in the right type already
            with self._copy.running(), torch.autocast(model.device.type, enabled=False):
                completions = complete(self._engine)
        except ValueError as error:
            raise ValueError(f"a prompt cannot be answered: {error}") from error
        after = self._engine.stats()
        if completions and after["num_steps"] == before["num_steps"]:
            raise RuntimeError("the engine has answered without a step")
        texts = [_text(tokenizer, one.token_ids) for one in completions]
        repeats = len(completions) // max(len(columns), 1)
        records = [record for record in columns for _ in range(repeats)]
        scores = judge(
            self._rewards,
            [_as_asked(text, one) for text, one in zip(texts, records, strict=True)],
            [one.token_ids for one in completions],
            records,
        )
        return Answers(
            completions=completions,
            texts=texts,
            scores=scores,
            rewards=weighted_sum(scores, self._weights),
            engine_steps=int(after["num_steps"] - before["num_steps"]),
            prefix_hits=int(after["prefix_cache_hits"] - before["prefix_cache_hits"]),
        )

    def close(self) -> None:
        """Free the engine's cache; a later answer makes another one."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._copy = None


def _text(tokenizer: AutoTokenizer, ids: Sequence[int]) -> str:
    if ids and ids[-1] in tokenizer.stop_ids:
        ids = ids[:-1]
    return tokenizer.decode(ids)


def _as_asked(text: str, record: Mapping[str, Any]) -> str | list[dict[str, str]]:
    """Text for a prompt that is text, a message for one made of messages."""
    if isinstance(record.get("prompt"), str):
        return text
    return [{"role": "assistant", "content": text}]
