"""Rotary position embedding with half rotation: channel i turns with channel i + D/2.

Llama's and Qwen's files on the Hugging Face hub are laid out so; Meta's and DeepSeek's own pair
(2i, 2i + 1) instead, which is the same up to a permutation of the channels.
"""

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions (arXiv 2104.09864).

    The frequencies base^(-2i/D) are computed anew in each forward, in float32: as a buffer they
    would follow the model to bfloat16, where the angle at position 1,000 is off by whole radians,
    and to the meta device, where they would be lost.
    """

    def __init__(self, dim: int, base: float):
        super().__init__()
        self.dim = dim
        self.base = base

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (N, D/2) float32, of positions (N,)."""
        exponent = torch.arange(0, self.dim, 2, device=position_ids.device).float() / self.dim
        # 1 / base^e, not base^-e: the last bit counts a hundred thousand times at that position
        angle = position_ids.float()[:, None] * (1.0 / self.base**exponent)  # (N, D/2)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads x (N, H, D) by the angles of their positions, cos and sin (N, D/2)."""
    first, second = x.float().chunk(2, dim=-1)  # (N, H, D/2) each
    cos, sin = cos[:, None], sin[:, None]  # (N, 1, D/2)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
