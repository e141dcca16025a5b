"""What the objectives share whose loss is the likelihood of tokens."""

from typing import Any

import torch
from torch import Tensor

from astrai_core.model import ModelConfig
from astrai_train.losses import IGNORED, cross_entropy
from astrai_train.metrics import TokenLikelihood
from astrai_train.modules.base import Batch, LMModule


class TokenModule(LMModule):
    """Learns the labels of a batch, each of them as much as any other.

    Args:
        model: Shape of a new model with random weights. Give this or init_from.
        options: Those of every objective.
    """

    def __init__(self, model: ModelConfig | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.likelihood = TokenLikelihood()
        self._byte_lengths: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Learn how many bytes each token stands for."""
        super().setup(stage)
        if self.tokenizer is not None:
            self._byte_lengths = torch.tensor(self.tokenizer.token_byte_lengths)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed negative log-likelihood of the labels and their number."""
        return cross_entropy(self.hidden_states(batch), self.model.output_weight, batch["labels"])

    def evaluate(self, batch: Batch) -> None:
        """Add a batch to the likelihood of the split."""
        total, count = self.loss(batch)
        labels = batch["labels"]
        num_bytes = torch.zeros_like(count)
        if self._byte_lengths is not None:
            self._byte_lengths = self._byte_lengths.to(labels.device)
            num_bytes = self._byte_lengths[labels[labels != IGNORED]].sum()
        self.likelihood.update(total, count, num_bytes)

    def evaluation(self) -> dict[str, Tensor]:
        """Return the likelihood of the split."""
        values = self.likelihood.compute()
        self.likelihood.reset()
        return values
