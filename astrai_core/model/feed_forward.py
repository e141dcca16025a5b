"""What a block does to each token alone."""

import torch.nn.functional as F
from torch import Tensor, nn

from astrai_core.model.layers import Linear


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): `W_down (silu(W_gate x) * W_up x)`."""

    def __init__(self, dim: int, dim_ffn: int, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(dim, dim_ffn, bias)
        self.up_proj = Linear(dim, dim_ffn, bias)
        self.down_proj = Linear(dim_ffn, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, dim) to (N, dim)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
