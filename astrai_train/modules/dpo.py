"""Learning from preferences: the better of two answers gains on the other.

P pairs, R packed rows of T positions. Both sides of a pair are in one batch, see `data.pairs`.

What a reader would get wrong: there is no second model. What the reference thinks of each pair is
computed once, before training, with the weights that training starts from, and kept beside the
data. Those are the weights of `init_from` also in a run that goes on: a checkpoint is read later.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from astrai_core.model.lora import lora_disabled, lora_layers
from astrai_train.data.pairs import DPODataset
from astrai_train.data.reference import ReferenceFile
from astrai_train.losses import IGNORED, token_logprobs
from astrai_train.losses.preference import (
    PreferenceLoss,
    Reduction,
    check_preference,
    preference_losses,
    sequence_logprobs,
)
from astrai_train.modules.base import Batch, LMModule

Reference = Literal["start", "lora_off", "none"]

_SAVE_EVERY = 20.0
"""Seconds of work that an interruption may cost."""
_WEIGHTS = "reference_weights"
_SPLITS = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
"""What data each command reads."""
_CHANGED = {
    "weights": "the weights that training starts from",
    "reference": "preference.reference",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "data": "the data",
    "precision": "trainer.precision",
}


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """The objective.

    Raises:
        ValueError: a value is out of its range, or two contradict each other.
    """

    loss: PreferenceLoss = "sigmoid"
    """sigmoid is DPO, with label_smoothing cDPO; sigmoid_norm takes each answer's mean over its
    tokens; robust corrects for wrong labels; ipo aims at a fixed margin; hinge; apo_zero and
    apo_down move both answers."""
    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: float = 0.0
    """Share of pairs that may be labelled the wrong way round, below 0.5."""
    reduction: Reduction = "sum"
    """Whether an answer counts by the sum over its tokens, or by their mean whatever its length."""
    reference: Reference = "start"
    """What the policy is compared with: start, the weights that training starts from; lora_off,
    the model without its adapters; none, nothing (reference-free)."""

    def __post_init__(self) -> None:
        check_preference(self.loss, self.beta, self.label_smoothing)


class DPOModule(LMModule):
    """Learns to prefer the chosen of two answers to the rejected one.

    Args:
        preference: The objective.
        options: Those of every objective.
    """

    is_ragged = True

    def __init__(self, preference: PreferenceConfig = PreferenceConfig(), **options: Any) -> None:
        super().__init__(**options)
        self.preference = preference
        self._weights = ""
        adapters = lora_layers(self.model).values()
        if preference.reference == "lora_off" and not adapters:
            raise ValueError(
                "preference.reference: lora_off needs adapters, and the model has none: set "
                "lora.rank, or preference.reference: start"
            )
        if any(layer.dropout for layer in adapters):
            raise ValueError(
                "lora.dropout must be 0 in DPO: it would make the policy differ from the reference "
                "by chance"
            )

    def setup(self, stage: str) -> None:
        """Have the reference's log-probabilities ready for the data of this command."""
        super().setup(stage)
        datasets = list(self._datasets(stage))
        if self.preference.reference == "none":
            return
        self._weights = _digest(self.model, self.preference.reference)
        for dataset in datasets:
            dataset.reference = self._reference(dataset)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the pairs' losses and how many pairs there are."""
        logprobs, lengths = self._logprobs(batch)
        scores = self._scores(batch, logprobs)
        preference = self.preference
        losses = preference_losses(
            scores,
            lengths,
            loss=preference.loss,
            beta=preference.beta,
            label_smoothing=preference.label_smoothing,
            reduction=preference.reduction,
        )
        count = torch.tensor(len(losses), device=losses.device)
        rewards = preference.beta * scores.detach()
        margins = rewards[:, 0] - rewards[:, 1]
        logprobs = logprobs.detach()
        for name, values in {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": margins > 0,
            "logps/chosen": logprobs[:, 0],
            "logps/rejected": logprobs[:, 1],
        }.items():
            self.record(name, values.sum(), count)
        return losses.sum(), count

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, float]]:
        """Return what the policy makes of each pair."""
        del batch_idx
        logprobs, _ = self._logprobs(batch)
        rewards = self.preference.beta * self._scores(batch, logprobs)
        return [
            {
                "pair": pair,
                "margin": chosen - rejected,
                "reward_chosen": chosen,
                "reward_rejected": rejected,
                "logp_chosen": logp_chosen,
                "logp_rejected": logp_rejected,
            }
            for pair, (chosen, rejected), (logp_chosen, logp_rejected) in zip(
                batch["pairs"].tolist(), rewards.tolist(), logprobs.tolist(), strict=True
            )
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which weights are the reference."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_WEIGHTS] = self._weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another reference.

        Raises:
            ValueError: training would start from other weights now.
        """
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get(_WEIGHTS, self._weights) != self._weights:
            raise ValueError(
                "init_from (or model and seed_everything) gives other weights than when this run "
                "began, and they are its reference: put those of then back, or start over with "
                "--fresh"
            )

    def _logprobs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of both sides of each pair, (P, 2), and their numbers of tokens."""
        labels = batch["labels"]
        each = token_logprobs(self.hidden_states(batch), self.model.output_weight, labels)
        sums, lengths = sequence_logprobs(
            each, labels != IGNORED, batch["document_ids"], 2 * len(batch["pairs"])
        )
        return sums.view(-1, 2), lengths.view(-1, 2)

    def _scores(self, batch: Batch, logprobs: Tensor) -> Tensor:
        return logprobs if self.preference.reference == "none" else logprobs - batch["reference"]

    def _datasets(self, stage: str) -> Iterator[DPODataset]:
        """The data of a command, each file or mixture's source by itself."""
        for split in _SPLITS[stage]:
            dataset = getattr(self._datamodule, f"{split}_dataset", None)
            for source in getattr(dataset, "sources", [dataset]):
                if source is None:
                    continue
                if not isinstance(source, DPODataset):
                    raise ValueError(
                        f"DPOModule learns from pairs: set data.stage to dpo ({split})"
                    )
                yield source

    def _reference(self, dataset: DPODataset) -> NDArray[np.float32]:
        """Log-probabilities (all pairs, 2) of the reference; rank 0 computes what is missing."""
        storage, tokenizer = dataset.storage, self.tokenizer
        template = tokenizer.chat_template if tokenizer else None
        key = {
            "weights": self._weights,
            "reference": self.preference.reference,
            "tokenizer": tokenizer.fingerprint if tokenizer else "",
            "template": template.fingerprint if template else "",
            "data": storage.fingerprint,
            "precision": str(self.trainer.precision),
        }
        file = ReferenceFile(storage.files[0], key, len(storage) // 2)
        strategy = self.trainer.strategy
        batches = strategy.broadcast(self._batches(dataset, file))
        if not batches:
            return file.values
        changes = " and ".join(_CHANGED[name] for name in file.changes())
        because = f", because {changes} changed" if changes else ""
        self.print(f"computing the reference's log-probabilities{because}: {file.path}")
        if self.trainer.is_global_zero:
            self.model.to(strategy.root_device)
        start = saved = said = time.monotonic()
        for number, batch in enumerate(batches, 1):
            if self.trainer.is_global_zero:
                self._compute(dataset, file, batch)
                now = time.monotonic()
                if number == len(batches) or now - saved > _SAVE_EVERY:
                    file.write()
                    saved = now
                if now - said > _SAVE_EVERY / 4:
                    left = (now - start) / number * (len(batches) - number)
                    self.print(f"reference: {number} of {len(batches)} batches, {left:.0f} s left")
                    said = now
            # in step at each batch: a wait for all of them could outlast the ranks' patience
            strategy.barrier("reference")
        file.read()
        return file.values

    def _batches(self, dataset: DPODataset, file: ReferenceFile) -> list[list[int]]:
        """What is missing, by number in the data set, with others of its length."""
        is_missing = np.isin(dataset.pairs, file.missing(dataset.pairs))
        numbers = np.flatnonzero(is_missing)
        longest = dataset.storage.input_ids.lengths.reshape(-1, 2).max(axis=1)
        order = numbers[np.argsort(longest[dataset.pairs[numbers]], kind="stable")].tolist()
        size = getattr(self._datamodule, "batch_size", 8)
        return [order[first : first + size] for first in range(0, len(order), size)]

    @torch.no_grad()
    def _compute(self, dataset: DPODataset, file: ReferenceFile, numbers: Sequence[int]) -> None:
        batch = dataset.collate([dataset[number] for number in numbers])
        batch = {name: value.to(self.trainer.strategy.root_device) for name, value in batch.items()}
        was_training = self.training
        self.eval()
        without = self.preference.reference == "lora_off"
        with (
            self.trainer.precision_plugin.val_step_context(),
            lora_disabled(self.model) if without else nullcontext(),
        ):
            logprobs, _ = self._logprobs(batch)
        self.train(was_training)
        pairs = batch["pairs"].tolist()
        wrong = ~logprobs.isfinite().all(1)
        if wrong.any():
            place = dataset.storage.place(2 * pairs[int(wrong.nonzero()[0])])
            raise ValueError(
                f"the reference gives {place} a log-probability that is no number: the weights "
                "that training starts from are damaged"
            )
        file.values[pairs] = logprobs.cpu().numpy()


def _digest(model: nn.Module, reference: Reference) -> str:
    """Hex digest of the weights that are the reference, and of their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if reference == "lora_off" and ".lora_" in name:
            continue
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
