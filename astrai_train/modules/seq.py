"""Pre-training."""

from torch import Tensor

from astrai_train.losses import cross_entropy
from astrai_train.modules.base import Batch, LMModule


class SEQModule(LMModule):
    """Learns the next token of running text."""

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed negative log-likelihood of all labels and their number."""
        return cross_entropy(self.hidden_states(batch), self.model.output_weight, batch["labels"])
