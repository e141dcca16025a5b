"""Learning from rewards: answers to one prompt, compared with each other.

Online, a batch of prompts is a rollout: every prompt is answered several times by the policy that
is trained, all at once, by an engine over its very weights. The rollout is then trained in
`micro_batches` pieces, `updates` times over, and each piece is one call of `training_step`; so the
loader hands each batch of prompts out that many times. A checkpoint between two optimizer steps
of one rollout keeps it.

Offline, responses and rewards come with the data, and a batch is one piece.

What a reader would get wrong: in the first step after a rollout the ratio to the policy that rolled
out is exactly 1, and clipping does nothing. That is so because nothing has been learned since.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from astrai_core.model import Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.actor import Actor, Answers, EngineFactory
from astrai_train.data.tokenizing import end_of_text_id
from astrai_train.losses import IGNORED, token_logprobs
from astrai_train.losses.policy import (
    PolicyConfig,
    clipped_policy_loss,
    group_advantages,
    kl_penalty,
    sum_over_tokens,
    window_count,
    zero_variance_groups,
)
from astrai_train.modules.base import LMModule
from astrai_train.reference import Reference
from astrai_train.rewards import RewardFunction
from astrai_train.rollout import (
    Piece,
    Rollout,
    RolloutConfig,
    best_completions,
    sample_completions,
)
from astrai_train.window import over_ranks


class GRPOModule(LMModule):
    """Learns what earns more reward than the other answers to the same prompt.

    Args:
        engine: What answers prompts, with the weights that are trained; null for stored responses.
        rewards: Functions that judge completions, by import path.
        reward_weights: A weight for each of them; null weighs each 1.
        rollout: How completions are sampled.
        policy: The objective.
        micro_batches: Pieces that a rollout is trained in, each one a forward and backward pass;
            null takes trainer.accumulate_grad_batches, which makes a pass one optimizer step.
        updates: How often a rollout is gone over.
    """

    is_ragged = True

    def __init__(
        self,
        engine: EngineFactory | None = None,
        rewards: list[RewardFunction] | None = None,
        reward_weights: list[float] | None = None,
        rollout: RolloutConfig = RolloutConfig(),
        policy: PolicyConfig = PolicyConfig(),
        micro_batches: int | None = None,
        updates: int = 1,
        **options: Any,
    ) -> None:
        rewards = rewards or []
        weights = reward_weights or [1.0] * len(rewards)
        if len(weights) != len(rewards):
            raise ValueError(
                f"reward_weights has {len(weights)} numbers for {len(rewards)} rewards; give one "
                "for each, or null"
            )
        if (engine is None) != (not rewards):
            raise ValueError(
                "engine and rewards belong together: give both to answer prompts and judge the "
                "answers, or neither where the data holds responses and rewards"
            )
        if updates < 1 or (micro_batches is not None and micro_batches < 1):
            raise ValueError(
                f"updates and micro_batches must be at least 1, not {updates} and {micro_batches}"
            )
        super().__init__(**options)
        self.rollout_config = rollout
        self.policy = policy
        self.updates = updates
        self.between_engine_steps: Callable[[], None] | None = None
        """Called while an engine answers; it may end the run by an exception."""
        self.tokens_read = 0
        """Tokens of the last piece of a rollout, prompts among them."""
        self._actor = None if engine is None else Actor(engine, rewards, weights, rollout.weights)
        self._micro_batches = micro_batches
        self._num_pieces = micro_batches or 1
        self._rollout: Rollout | None = None
        self._before_window: tuple[Rollout | None, int] = (None, 0)
        self._reference = Reference(self.model) if policy.needs_reference else None
        self._synced_step = 0
        if policy.sync_interval and self._reference and not self._reference.can_sync:
            raise ValueError(
                f"policy.sync_interval {policy.sync_interval} cannot be kept with LoRA, whose "
                "reference is the model without it; set it to 0"
            )

    def setup(self, stage: str) -> None:
        """Tell the loader how often a batch of prompts is trained."""
        super().setup(stage)
        self._padding_id = end_of_text_id(self._known_tokenizer)
        if stage != "fit" or self._actor is None:
            return
        accumulate = self.trainer.accumulate_grad_batches
        self._num_pieces = self._micro_batches or accumulate
        repeats = self.num_repeats(accumulate)
        if self._num_pieces % accumulate:
            raise ValueError(
                f"micro_batches {self._num_pieces} must be a multiple of "
                f"trainer.accumulate_grad_batches {accumulate}, so that rollouts begin where "
                "optimizer steps do"
            )
        if repeats > 1:
            if not hasattr(self._datamodule, "repeats"):
                raise ValueError(
                    f"{type(self._datamodule).__name__} cannot hand a batch out {repeats} times; "
                    "use TokenDataModule, or set micro_batches and updates to 1"
                )
            self._datamodule.repeats = repeats  # pyright: ignore[reportAttributeAccessIssue]

    def num_repeats(self, accumulate: int) -> int:
        """Each piece of a rollout, for each update, is a batch of the same prompts."""
        return 1 if self._actor is None else (self._micro_batches or accumulate) * self.updates

    def teardown(self, stage: str) -> None:
        """Free the engine's cache."""
        super().teardown(stage)
        if self._actor is not None:
            self._actor.close()

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the tokens' losses and what divides it."""
        if "prompts" not in batch:
            return self._stored_loss(batch)
        rollout = self._rollout
        if rollout is None or rollout.num_taken % self.trainer.accumulate_grad_batches == 0:
            self._before_window = (rollout, 0 if rollout is None else rollout.num_taken)
        if rollout is None or rollout.is_over(self.updates) or not rollout.is_of(batch["indices"]):
            rollout = self._rollout = self._roll_out(batch)
        number = rollout.num_taken % rollout.num_pieces
        is_first_step = rollout.num_taken < self.trainer.accumulate_grad_batches
        rollout.num_taken += 1
        numbers = rollout.numbers(number)
        piece = rollout.pack(numbers[self._teaches(rollout)[numbers]], self._padding_id)
        inputs = piece.on(self.device)
        self.tokens_read = int((piece.batch["document_ids"] >= 0).sum())
        logprobs = self._score(self.hidden_states(inputs), inputs)
        if is_first_step:
            self._keep_old(rollout, piece, logprobs)
        trained = numbers[rollout.is_trained[numbers]]
        total = self._objective(
            logprobs,
            rollout.old_logprobs[piece.places].to(logprobs),
            self._reference_of(rollout, piece, inputs),
            rollout.advantages[piece.completions].to(logprobs),
            rollout.completion_lengths[piece.completions].to(logprobs),
        )
        count = window_count(
            self.policy.aggregation,
            num_completions=len(numbers),
            num_tokens=int(rollout.completion_lengths[trained].sum()),
            rollout_tokens=rollout.num_trained_tokens / rollout.num_pieces,
            max_completion=self.rollout_config.max_completion,
        )
        return total, torch.tensor(count, dtype=torch.float64, device=self.device)

    def _stored_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of responses whose rewards came with them."""
        owners = batch["document_ids"][batch["labels"] != IGNORED]  # (n,)
        advantages = self._advantages(batch["rewards"], batch["groups"])
        self._record_rewards(
            batch["rewards"][:, None], batch["rewards"], batch["groups"], ["stored"]
        )
        lengths = torch.bincount(owners, minlength=len(advantages))
        logprobs = self._score(self.hidden_states(batch), batch)
        reference = None if self._reference is None else self._reference.score(batch, self._scorer)
        total = self._objective(
            logprobs,
            logprobs.detach(),
            reference,
            advantages[owners].to(logprobs),
            lengths[owners].to(logprobs),
        )
        count = window_count(
            self.policy.aggregation,
            num_completions=len(advantages),
            num_tokens=len(owners),
            rollout_tokens=len(owners),
            max_completion=self.rollout_config.max_completion,
        )
        return total, torch.tensor(count, dtype=torch.float64, device=self.device)

    def _objective(
        self,
        logprobs: Tensor,
        old: Tensor,
        reference: Tensor | None,
        advantages: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        """Sum the losses of n tokens, weighted as the aggregation says, and record what they show.

        All are (n,); `advantages` and `lengths` are those of the completion a token belongs to.
        """
        policy = self.policy
        if policy.ratio_to == "reference":
            assert reference is not None
            old = reference
        losses, is_clipped = clipped_policy_loss(
            logprobs, old, advantages, policy.clip_low, policy.clip_high, policy.max_ratio
        )
        self._record_mean("clipped", is_clipped)
        if reference is not None:
            form = "k3" if policy.kl == "none" else policy.kl
            penalty = kl_penalty(logprobs, reference, form)
            self._record_mean("kl", penalty.detach())
            if policy.kl != "none":
                losses = losses + policy.kl_weight * penalty
        return sum_over_tokens(losses, lengths, policy.aggregation)

    def _score(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return self._scorer(self.model, hidden, batch["labels"])

    def _scorer(self, model: Transformer, hidden: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities (n,) of the labels, row after row, at the sampling temperature."""
        temperature = self.rollout_config.temperature
        return token_logprobs(hidden, model.output_weight, labels, temperature)[labels != IGNORED]

    def _teaches(self, rollout: Rollout) -> Tensor:
        """Which completions (N,) can change anything; the others need no forward pass."""
        if self.policy.kl != "none":
            return rollout.is_trained
        return rollout.is_trained & (rollout.advantages != 0)

    def _roll_out(self, batch: dict[str, Any]) -> Rollout:
        """Answer a batch of prompts, and judge and compare the answers."""
        prompts, indices, config = batch["prompts"], batch["indices"], self.rollout_config
        actor, tokenizer = self._known_actor, self._known_tokenizer
        answers = actor.answer(
            self.model,
            tokenizer,
            batch["columns"],
            lambda engine: sample_completions(
                engine,
                prompts,
                indices,
                config,
                step=self.trainer.global_step,
                stop_ids=tokenizer.stop_ids,
                between_steps=self.between_engine_steps,
            ),
        )
        groups = torch.arange(len(prompts)).repeat_interleave(config.num_generations)
        truncated = answers.is_truncated
        rollout = Rollout.of(
            indices,
            [prompt for prompt in prompts for _ in range(config.num_generations)],
            answers.completions,
            self._advantages(answers.rewards, groups),
            ~truncated if self.policy.mask_truncated else torch.ones_like(truncated),
            self._num_pieces,
        )
        self._record_rewards(answers.scores, answers.rewards, groups, actor.reward_names)
        self._record_mean("rollout/length", rollout.completion_lengths)
        self._record_mean("rollout/truncated", truncated)
        # of tokens drawn at temperature 1, the mean of -log p is the entropy
        self._record_mean("rollout/surprise", -rollout.sampled_logprobs)
        self.record("rollout/engine_steps", torch.tensor(answers.engine_steps), 1)
        self.record("rollout/prefix_hits", torch.tensor(answers.prefix_hits), 1)
        self._score_later_pieces(rollout)
        return rollout

    @torch.no_grad()
    def _score_later_pieces(self, rollout: Rollout) -> None:
        """Score what is trained after an optimizer step, as long as the policy is the old one."""
        for number in range(self.trainer.accumulate_grad_batches, rollout.num_pieces):
            numbers = rollout.numbers(number)
            piece = rollout.pack(numbers[self._teaches(rollout)[numbers]], self._padding_id)
            inputs = piece.on(self.device)
            self._keep_old(rollout, piece, self._score(self.hidden_states(inputs), inputs))

    def _keep_old(self, rollout: Rollout, piece: Piece, logprobs: Tensor) -> None:
        """Note what the policy that rolled out thinks of a piece."""
        old = logprobs.detach().float().cpu()
        rollout.old_logprobs[piece.places] = old
        if self.rollout_config.temperature == 1:  # the engine's are at 1, whatever it samples at
            difference = (old - rollout.sampled_logprobs[piece.places]).abs()
            self._record_mean("rollout/mismatch", difference)

    def _reference_of(
        self, rollout: Rollout, piece: Piece, inputs: dict[str, Tensor]
    ) -> Tensor | None:
        """What the reference thinks of a piece; it is asked once per rollout."""
        if self._reference is None:
            return None
        if rollout.reference_logprobs[piece.places].isnan().any():
            scores = self._reference.score(inputs, self._scorer)
            rollout.reference_logprobs[piece.places] = scores.float().cpu()
        return rollout.reference_logprobs[piece.places].to(self.device)

    def _advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        std = None
        if self.policy.advantage_scale == "batch":
            known = rewards[~rewards.isnan()].double()
            count = self._sum_over_ranks(torch.tensor(len(known), dtype=torch.float64))
            mean = self._sum_over_ranks(known.sum()) / count
            squares = self._sum_over_ranks((known - mean.to(known.device)).square().sum())
            std = (squares / (count - 1)).sqrt().to(rewards.device)
        return group_advantages(rewards, groups, self.policy.advantage_scale, std)

    def _record_rewards(
        self, scores: Tensor, rewards: Tensor, groups: Tensor, names: Sequence[str]
    ) -> None:
        for name, column in zip(names, scores.T, strict=True):
            known = column[~column.isnan()]
            self._record_mean(f"reward/{name}", known)
            if len(known) > 1:
                self.record(f"reward/{name}_std", known.double().std(), 1)
        self._record_mean("reward", rewards[~rewards.isnan()])
        alike, total = zero_variance_groups(rewards, groups)
        self.record("frac_reward_zero_std", torch.tensor(alike), total)

    def _record_mean(self, name: str, values: Tensor) -> None:
        """Record the mean of some numbers, of which there may be none."""
        if values.numel():
            self.record(name, values.double().sum(), values.numel())

    @property
    def _known_actor(self) -> Actor:
        if self._actor is None:
            raise ValueError(
                "the data holds prompts without responses: set engine and rewards, or give data "
                "with responses and rewards"
            )
        return self._actor

    @property
    def _known_tokenizer(self) -> AutoTokenizer:
        if self.tokenizer is None:
            raise ValueError("GRPO needs a tokenizer, and this run's data module has none")
        return self.tokenizer

    def rewind_window(self) -> None:
        """Take the pieces of the window back."""
        self._rollout, taken = self._before_window
        if self._rollout is not None:
            self._rollout.num_taken = taken

    def evaluate(self, batch: dict[str, Any]) -> None:
        """Measure what the likeliest answer to each prompt earns, or how stored ones are ranked."""
        if "prompts" not in batch:
            self._evaluate_stored(batch)
            return
        answers = self._answer_once(batch)
        for name, column in zip(self._known_actor.reward_names, answers.scores.T, strict=True):
            self._record_mean(f"reward/{name}", column[~column.isnan()])
        self._record_mean("reward", answers.rewards[~answers.rewards.isnan()])
        self._record_mean("length", answers.lengths)
        self._record_mean("truncated", answers.is_truncated)

    def _evaluate_stored(self, batch: dict[str, Tensor]) -> None:
        """Record how often the better one of two responses to a prompt is the likelier one."""
        owners = batch["document_ids"][batch["labels"] != IGNORED]
        rewards, groups = batch["rewards"].double(), batch["groups"]
        scores = self._score(self.hidden_states(batch), batch).double()
        sums = torch.zeros_like(rewards).index_add(0, owners, scores)
        means = sums / torch.bincount(owners, minlength=len(rewards))
        is_pair = (groups[:, None] == groups) & (rewards[:, None] > rewards)
        self.record("ranked", ((means[:, None] > means) & is_pair).sum(), is_pair.sum())

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Answer each prompt once: its record, the answer and what that earns."""
        del batch_idx
        if "prompts" not in batch:
            raise ValueError("the data holds responses already; predict wants prompts alone")
        answers = self._answer_once(batch)
        names = self._known_actor.reward_names
        return [
            {
                **record,
                "completion": text,
                "reward": _plain(reward),
                "rewards": dict(zip(names, map(_plain, scores), strict=True)),
            }
            for record, text, reward, scores in zip(
                batch["columns"],
                answers.texts,
                answers.rewards.tolist(),
                answers.scores.tolist(),
                strict=True,
            )
        ]

    def _answer_once(self, batch: dict[str, Any]) -> Answers:
        actor, tokenizer = self._known_actor, self._known_tokenizer
        return actor.answer(
            self.model,
            tokenizer,
            batch["columns"],
            lambda engine: best_completions(
                engine,
                batch["prompts"],
                batch["indices"],
                self.rollout_config,
                stop_ids=tokenizer.stop_ids,
                between_steps=self.between_engine_steps,
            ),
        )

    def on_train_start(self) -> None:
        """Count the reference's steps from here."""
        super().on_train_start()
        self._synced_step = self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the reference catch up where that is due."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        step, interval = self.trainer.global_step, self.policy.sync_interval
        if interval and step != self._synced_step and step % interval == 0:
            assert self._reference is not None
            self._reference.sync()
            self._synced_step = step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save a rollout that is not over, and a reference that is no longer the first model."""
        super().on_save_checkpoint(checkpoint)
        rollout = self._rollout
        is_open = rollout is not None and not rollout.is_over(self.updates)
        states = over_ranks(rollout.state_dict() if rollout is not None and is_open else None)
        if any(state is not None for state in states):
            checkpoint["rollout"] = states
        if self.policy.sync_interval and self._reference is not None:
            checkpoint["reference"] = self._reference.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the rollout and the reference."""
        super().on_load_checkpoint(checkpoint)
        states = checkpoint.get("rollout", [])
        # with another number of ranks none may be open, which `spread_anew` sees to
        is_known = len(states) == self.trainer.world_size
        state = states[self.global_rank] if is_known else None
        self._rollout = None if state is None else Rollout.from_state(state)
        if self._reference is not None and "reference" in checkpoint:
            self._reference.load_state_dict(checkpoint["reference"])


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
