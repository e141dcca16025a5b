"""What is reported: sums over all tokens of all ranks, before anything is divided."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class Sums:
    """Totals and their counts, by name.

    Args:
        values: what `state` returned.
    """

    def __init__(self, values: dict[str, Tensor] | None = None) -> None:
        self.values = dict(values or {})
        """The total and the count of each name, (2,) float64, where they were computed."""

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to a total and to its count, without waiting for a device."""
        total = torch.as_tensor(total, dtype=torch.float64).detach()
        count = torch.as_tensor(count, dtype=torch.float64).to(total.device)
        self._add(name, torch.stack([total, count]))

    def merge(self, others: "Sums") -> None:
        """Add all of another's totals and counts."""
        for name, pair in others.values.items():
            self._add(name, pair)

    def state(self) -> dict[str, Tensor]:
        """Return what another one goes on from."""
        return dict(self.values)

    def _add(self, name: str, pair: Tensor) -> None:
        before = self.values.get(name)
        self.values[name] = pair if before is None else before.to(pair.device) + pair


class TokenLikelihood(Metric):
    """Mean loss and negative log-likelihood of the trained tokens, and what follows from them.

    `loss` is what was trained, in nats a token; with label smoothing `nll` is beside it, without.
    `ppl` is the exponential of the `nll`. `bpb`, bits per byte, divides by the bytes of text that
    the tokens stand for, so models with different tokenizers compare; the bits of control tokens
    count, although they stand for no byte.
    """

    full_state_update = False
    loss: Tensor
    nats: Tensor
    num_tokens: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float64: a float32 sum stops growing properly after some ten million tokens
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, nats: Tensor, num_tokens: Tensor, num_bytes: Tensor) -> None:
        """Add the sums of a batch; `nats` are without label smoothing."""
        self.loss += loss.double()
        self.nats += nats.double()
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes

    def compute(self) -> dict[str, Tensor]:
        """Return what the class names, of what was counted; NaN without any token."""
        nll = self.nats / self.num_tokens
        values = {"loss": self.loss / self.num_tokens, "ppl": nll.exp()}
        if self.loss != self.nats:
            values["nll"] = nll
        if self.num_bytes > 0:
            values["bpb"] = self.nats / math.log(2) / self.num_bytes
        return values
