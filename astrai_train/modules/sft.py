"""Instruction tuning."""

from torch import Tensor

from astrai_train.losses import cross_entropy
from astrai_train.modules.base import Batch, LMModule


class SFTModule(LMModule):
    """Learns the assistant's tokens of conversations; the labels of all others are ignored."""

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed negative log-likelihood of the answers' tokens and their number."""
        return cross_entropy(self.hidden_states(batch), self.model.output_weight, batch["labels"])
