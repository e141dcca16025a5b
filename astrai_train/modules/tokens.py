"""What the objectives share whose loss is the likelihood of tokens."""

from typing import Any

import torch
from torch import Tensor

from astrai_core.model import ModelConfig
from astrai_train.losses import IGNORED, smoothed_cross_entropy
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

    def _sums(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.hidden_states(batch)
        return smoothed_cross_entropy(
            hidden, self.model.output_weight, batch["labels"], self.label_smoothing
        )
