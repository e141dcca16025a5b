"""What validation reports, summed over all tokens of all ranks before anything is divided."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenLikelihood(Metric):
    """Mean negative log-likelihood of the trained tokens, and what follows from it.

    `loss` is in nats a token, `ppl` its exponential. `bpb`, bits per byte, divides by the bytes of
    text that the tokens stand for, so models with different tokenizers compare; the bits of
    control tokens count, although they stand for no byte.
    """

    full_state_update = False
    nats: Tensor
    num_tokens: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float64: a float32 sum stops growing properly after some ten million tokens
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, num_tokens: Tensor, num_bytes: Tensor) -> None:
        """Add the sums of a batch."""
        self.nats += nats.double()
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` and `ppl`, and `bpb` where bytes were counted; NaN without any token."""
        loss = self.nats / self.num_tokens
        values = {"loss": loss, "ppl": loss.exp()}
        if self.num_bytes > 0:
            values["bpb"] = self.nats / math.log(2) / self.num_bytes
        return values
