"""The three layers everything is made of, initialised as one small-variance normal."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02


def draw_(weight: Tensor, std: float = INIT_STD) -> None:
    """Draw a normal matrix, in place; on the meta device there is nothing to draw.

    torch would do it there, by importing its compiler: a second and 90 MB at every start.
    """
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


class Linear(nn.Module):
    """`y = x W^T (+ b)`; weight (out, in)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight; zero the bias."""
        draw_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Rows of a (vocab, dim) matrix."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrix."""
        draw_(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to (..., dim)."""
        return F.embedding(ids, self.weight)

    def project(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., vocab), as the output layer of a model that ties the two."""
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (arXiv 1910.07467)."""

    def __init__(self, dim: int, norm_eps: float):
        super().__init__()
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a pure normalisation."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., dim)."""
        # under autocast heads are bfloat16 and the weight is not; the fused kernel wants one type
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.norm_eps)
