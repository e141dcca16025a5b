"""What the objectives share whose loss is the likelihood of tokens."""

from typing import Any

import torch
from torch import Tensor

from astrai_core.model import ModelConfig
from astrai_train.losses import IGNORED, smoothed_cross_entropy, token_logprobs
from astrai_train.metrics import TokenLikelihood
from astrai_train.modules.base import Batch, LMModule


class TokenModule(LMModule):
    """Learns the labels of a batch, each of them as much as any other.

    Args:
        model: Shape of a new model with random weights. Give this or init_from.
        label_smoothing: Share of each target that is spread evenly over the vocabulary. `loss` is
            with it; `nll`, and the perplexity and bits per byte of an evaluation, are without.
        options: Those of every objective.

    Raises:
        ValueError: label_smoothing is out of range.
    """

    def __init__(
        self, model: ModelConfig | None = None, label_smoothing: float = 0.0, **options: Any
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be from 0 to below 1, not {label_smoothing}")
        super().__init__(model, **options)
        self.label_smoothing = label_smoothing
        self.likelihood = TokenLikelihood()
        self._byte_lengths: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Learn how many bytes each token stands for."""
        super().setup(stage)
        if self.tokenizer is not None:
            self._byte_lengths = torch.tensor(self.tokenizer.token_byte_lengths)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed loss of the labels and their number."""
        total, nats, count = self._sums(batch)
        if self.label_smoothing:
            self.record("nll", nats, count)
        return total, count

    def evaluate(self, batch: Batch) -> None:
        """Add a batch to the likelihood of the split."""
        total, nats, count = self._sums(batch)
        labels = batch["labels"]
        num_bytes = torch.zeros_like(count)
        if self._byte_lengths is not None:
            self._byte_lengths = self._byte_lengths.to(labels.device)
            num_bytes = self._byte_lengths[labels[labels != IGNORED]].sum()
        self.likelihood.update(total, nats, count, num_bytes)

    def evaluation(self) -> dict[str, Tensor]:
        """Return the likelihood of the split."""
        values = self.likelihood.compute()
        self.likelihood.reset()
        return values

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Score what a batch has of each document or conversation."""
        del batch_idx
        labels, documents = batch["labels"], batch["document_ids"]
        scores = token_logprobs(self.hidden_states(batch), self.model.output_weight, labels)
        dataset: Any = self.trainer.predict_dataloaders.dataset  # pyright: ignore
        parts: list[dict[str, Any]] = []
        for row, item in enumerate(batch["items"].tolist()):
            if item < 0:
                continue
            for document, sample in enumerate(dataset.samples(item)):
                is_own = (documents[row] == document) & (labels[row] != IGNORED)
                parts.append(
                    {
                        "sample": sample,
                        "place": dataset.storage.place(sample),
                        "logprob": scores[row][is_own].double().sum().item(),
                        "tokens": int(is_own.sum()),
                    }
                )
        return parts

    def predictions(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the parts of each sample, which may be cut into several rows.

        Returns:
            For each sample in order where it comes from, its number of scored tokens, their summed
            log-probability, and their mean negative one; None without any.
        """
        whole: dict[int, dict[str, Any]] = {}
        for part in sorted(parts, key=lambda part: part["sample"]):
            line = whole.setdefault(
                part["sample"], {"place": part["place"], "tokens": 0, "logprob": 0.0}
            )
            line["tokens"] += part["tokens"]
            line["logprob"] += part["logprob"]
        for line in whole.values():
            line["nll"] = -line["logprob"] / line["tokens"] if line["tokens"] else None
        return list(whole.values())

    def _sums(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.hidden_states(batch)
        return smoothed_cross_entropy(
            hidden, self.model.output_weight, batch["labels"], self.label_smoothing
        )
