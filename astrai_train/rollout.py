"""Completions of a policy, and how training goes over them in pieces.

N completions of S tokens together with their prompts, C tokens without. Everything is laid end to
end, so that it is a handful of tensors to save and nothing is padded:

    tokens           p p p c c | p p p c c c c | p p c ...      (S,)
    per completion   lengths, advantage, whether it is trained  (N,)
    per token        log-probabilities under other policies     (C,), NaN where not known yet
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from astrai_core.generation import Completion, GenerationEngine, SamplingParams
from astrai_train.data.packing import IGNORED, PADDING, pack_samples
from astrai_train.policy_copy import Rounding

_ROUNDED_TO = 16
"""Rows are a multiple of it long, so that a compiled model meets few lengths."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are sampled.

    Raises:
        ValueError: a value is out of its range; the message names the option.
    """

    num_generations: int = 8
    """Completions of each prompt, which are compared with each other."""
    max_completion: int = 256
    """Most tokens of a completion, the stop token included."""
    temperature: float = 1.0
    """Divides the logits where tokens are drawn and where they are scored."""
    top_p: float = 1.0
    """Below 1, tokens are drawn from another distribution than the one that is trained."""
    top_k: int = 0
    """Above 0, tokens are drawn from another distribution than the one that is trained."""
    eval_temperature: float = 0.0
    """The same where a validation answers each prompt once; 0 takes the likeliest tokens."""
    weights: Rounding | None = None
    """w8a8 answers with weights that are rounded to bytes anew after each update: from a little
    other distribution than the one that is trained, which `rollout/mismatch` tells."""
    seed: int = 0
    """Of all draws, with the optimizer step, the prompt's number and the completion's."""

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise ValueError(
                f"rollout.num_generations must be at least 2, not {self.num_generations}: a "
                "completion is judged by comparison with others of its prompt"
            )
        if self.max_completion < 1:
            raise ValueError(
                f"rollout.max_completion must be at least 1, not {self.max_completion}"
            )
        if not 0 < self.temperature <= 100:
            raise ValueError(
                f"rollout.temperature must be above 0 and at most 100, not {self.temperature}: "
                "greedy completions of one prompt would all be the same"
            )
        if not 0 <= self.eval_temperature <= 100:
            raise ValueError(
                f"rollout.eval_temperature must be from 0 to 100, not {self.eval_temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"rollout.top_k must be at least 0, not {self.top_k}")


def sample_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """The seed of one completion: the same in a resumed run, another at every step."""
    key = f"{seed}/{step}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1


def sample_completions(
    engine: GenerationEngine,
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    config: RolloutConfig,
    *,
    step: int,
    stop_ids: frozenset[int],
    between_steps: Callable[[], None] | None = None,
) -> list[Completion]:
    """Complete each prompt `num_generations` times, all at once and with no prefix cached.

    Args:
        engine: told first that the weights have changed.
        prompts: token ids.
        indices: number of each prompt in its data set.
        config: how.
        step: optimizer steps done.
        stop_ids: tokens that end a completion.
        between_steps: see `GenerationEngine.generate`.

    Returns:
        The completions of the first prompt, then those of the second, and so on.
    """
    engine.update_weights()
    params = [
        SamplingParams(
            max_tokens=config.max_completion,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop_token_ids=tuple(sorted(stop_ids)),
            seed=sample_seed(config.seed, step, index, sample),
            logprobs=0,
        )
        for index in indices
        for sample in range(config.num_generations)
    ]
    repeated = [prompt for prompt in prompts for _ in range(config.num_generations)]
    return engine.generate(repeated, params, between_steps) if repeated else []


def best_completions(
    engine: GenerationEngine,
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    config: RolloutConfig,
    *,
    stop_ids: frozenset[int],
    between_steps: Callable[[], None] | None = None,
) -> list[Completion]:
    """Complete each prompt once, as a validation does: the same draws at every step."""
    engine.update_weights()
    params = [
        SamplingParams(
            max_tokens=config.max_completion,
            temperature=config.eval_temperature,
            stop_token_ids=tuple(sorted(stop_ids)),
            seed=sample_seed(config.seed, 0, index, 0),
        )
        for index in indices
    ]
    return engine.generate(prompts, params, between_steps) if prompts else []


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some of a rollout's completions as a batch of packed rows; n scored tokens."""

    batch: dict[str, Tensor]
    """As of `LMModule`; the labels are the completions' tokens."""
    places: Tensor
    """(n,), where each label, row after row, stands among the rollout's C tokens."""
    completions: Tensor
    """(n,), the completion that each label belongs to."""

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The batch on a device."""
        return {name: values.to(device) for name, values in self.batch.items()}


@dataclass(kw_only=True, eq=False)
class Rollout:
    """Completions with what training needs of them.

    Training takes them in `num_pieces` pieces, again and again; which piece is next is part of the
    state, for a checkpoint can fall between two of them.
    """

    indices: Tensor
    """Numbers of the prompts in their data set."""
    tokens: Tensor
    """(S,) int64."""
    prompt_lengths: Tensor
    """(N,) int64."""
    completion_lengths: Tensor
    """(N,) int64."""
    advantages: Tensor
    """(N,) float64."""
    is_trained: Tensor
    """(N,) bool; others weigh nothing."""
    sampled_logprobs: Tensor
    """(C,) float32, the engine's own, at temperature 1."""
    old_logprobs: Tensor
    """(C,) float32, training's own of the policy that rolled out, at the sampling temperature."""
    reference_logprobs: Tensor
    """(C,) float32, of the reference."""
    num_pieces: int
    num_taken: int = 0
    """Pieces taken so far, of all passes."""

    @classmethod
    def of(
        cls,
        indices: Sequence[int],
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Completion],
        advantages: Tensor,
        is_trained: Tensor,
        num_pieces: int,
    ) -> "Rollout":
        """Lay completions end to end; `prompts` has the prompt of each."""
        answers = [one.token_ids for one in completions]
        flat = [i for pair in zip(prompts, answers, strict=True) for ids in pair for i in ids]
        total = sum(map(len, answers))
        return cls(
            indices=torch.tensor(list(indices), dtype=torch.int64),
            tokens=torch.tensor(flat, dtype=torch.int64),
            prompt_lengths=torch.tensor([len(ids) for ids in prompts], dtype=torch.int64),
            completion_lengths=torch.tensor([len(ids) for ids in answers], dtype=torch.int64),
            advantages=advantages.double(),
            is_trained=is_trained,
            sampled_logprobs=torch.tensor([p for one in completions for p in one.logprobs]),
            old_logprobs=torch.full((total,), torch.nan),
            reference_logprobs=torch.full((total,), torch.nan),
            num_pieces=num_pieces,
        )

    @property
    def num_completions(self) -> int:
        """N."""
        return len(self.completion_lengths)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens of completions that are trained."""
        return int(self.completion_lengths[self.is_trained].sum())

    def is_over(self, updates: int) -> bool:
        """Whether all pieces were taken `updates` times."""
        return self.num_taken >= self.num_pieces * updates

    def is_of(self, indices: Sequence[int]) -> bool:
        """Whether these are the numbers of its prompts."""
        return self.indices.tolist() == list(indices)

    def numbers(self, piece: int) -> Tensor:
        """The completions of a piece: the longest are dealt out first, one to each piece in turn.

        A piece is empty where there are fewer completions than pieces.
        """
        order = torch.argsort(self.completion_lengths + self.prompt_lengths, stable=True).flip(0)
        return order[piece :: self.num_pieces].sort().values

    def pack(self, numbers: Tensor, padding_id: int) -> Piece:
        """Put completions with their prompts into rows; none at all is a row of padding."""
        lengths = self.prompt_lengths + self.completion_lengths
        ends, completion_ends = lengths.cumsum(0), self.completion_lengths.cumsum(0)
        chosen = numbers.tolist()
        longest = max(int(lengths[numbers].max()) if chosen else 1, 1)
        window = -(-longest // _ROUNDED_TO) * _ROUNDED_TO
        packed = pack_samples([int(lengths[number]) for number in chosen], window)
        rows = [packed[row].tolist() for row in range(len(packed))] or [[]]
        shape = (len(rows), window)
        batch = {
            "input_ids": torch.full(shape, padding_id),
            "labels": torch.full(shape, IGNORED),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
            "document_ids": torch.full(shape, PADDING),
        }
        places: list[Tensor] = []
        owners: list[Tensor] = []
        for row, members in enumerate(rows):
            begin = 0
            for document, member in enumerate(members):
                number = chosen[member]
                length, prompt = int(lengths[number]), int(self.prompt_lengths[number])
                last, own = int(ends[number]), int(self.completion_lengths[number])
                ids = self.tokens[last - length : last]
                end = begin + length
                batch["input_ids"][row, begin:end] = ids
                batch["position_ids"][row, begin:end] = torch.arange(length)
                batch["document_ids"][row, begin:end] = document
                # the last token of the prompt predicts the first of the completion
                batch["labels"][row, begin + prompt - 1 : end - 1] = ids[prompt:]
                stop = int(completion_ends[number])
                places.append(torch.arange(stop - own, stop))
                owners.append(torch.full((own,), number))
                begin = end
        empty = torch.zeros(0, dtype=torch.int64)
        return Piece(
            batch=batch,
            places=torch.cat([empty, *places]),
            completions=torch.cat([empty, *owners]),
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Rollout":
        """What a checkpoint kept."""
        return cls(**state)
