"""Rotary position embedding: pairs of a head's channels turn by angles that grow with position.

A pair is channel i with i + D/2, as in Llama's and Qwen's files on the Hugging Face hub, or 2i
with 2i + 1, as in DeepSeek's. `RopeScaling` names the rules that slow the frequencies down.
"""

import math

import torch
from torch import Tensor, nn

from astrai_core.model.rope_scaling import RopeScaling


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions (arXiv 2104.09864).

    The frequencies base^(-2i/D) are computed anew in each forward, in float32: as a buffer they
    would follow the model to bfloat16, where the angle at position 1,000 is off by whole radians,
    and to the meta device, where they would be lost.
    """

    def __init__(self, dim: int, base: float, scaling: RopeScaling | None = None):
        super().__init__()
        self.dim = dim
        self.base = base
        self.scaling = scaling
        self.amplitude = 1.0
        if scaling is not None and scaling.rope_type == "yarn":
            self.amplitude = _yarn_amplitude(scaling)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (N, D/2) float32, of positions (N,)."""
        angle = position_ids.float()[:, None] * self.frequencies(position_ids.device)  # (N, D/2)
        return angle.cos() * self.amplitude, angle.sin() * self.amplitude

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position of each pair, (D/2,) float32."""
        exponent = torch.arange(0, self.dim, 2, device=device).float() / self.dim
        wavelength = self.base**exponent  # in positions, over 2 pi
        # 1 / base^e, not base^-e: the last bit counts a hundred thousand times at that position
        if self.scaling is None:
            return 1.0 / wavelength
        if self.scaling.rope_type == "linear":
            return 1.0 / wavelength / self.scaling.factor
        if self.scaling.rope_type == "llama3":
            return _llama3(1.0 / wavelength, self.scaling)
        return _yarn(wavelength, self.base, self.scaling)


class TabulatedRotary(RotaryEmbedding):
    """The same cosines and sines, computed once for all positions of a context.

    Args:
        rotary: computes them.
        max_len: positions are below it; two tables of max_len x D/2 numbers are kept.
    """

    def __init__(self, rotary: RotaryEmbedding, max_len: int):
        super().__init__(rotary.dim, rotary.base, rotary.scaling)
        # no buffers, which would follow the model to bfloat16
        self._tables = rotary(torch.arange(max_len))

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (N, D/2) float32, of positions (N,)."""
        cos, sin = self._tables
        return cos.index_select(0, position_ids), sin.index_select(0, position_ids)


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow the pairs that turn less than low_freq_factor times in the original context."""
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_len
    assert low is not None
    assert high is not None
    assert length is not None
    turns = length / (2 * math.pi / frequency)
    share = ((turns - low) / (high - low)).clamp(0, 1)  # of the frequency that stays
    return (1 - share) * frequency / scaling.factor + share * frequency


def _yarn(wavelength: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """Slow the pairs that turn seldom, keep those that turn often, a ramp over pairs between."""
    length, num_pairs = scaling.original_max_len, wavelength.shape[0]
    assert length is not None

    def pair_turning(times: float) -> float:
        """Number of the pair, a fraction, that turns so many times in the original context."""
        return num_pairs * math.log(length / (times * 2 * math.pi)) / math.log(base)

    first, last = pair_turning(scaling.beta_fast or 32), pair_turning(scaling.beta_slow or 1)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # the reference bounds by channels, not by pairs, and so do we
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    width = last - first if last != first else 1e-3
    ramp = ((torch.arange(num_pairs, device=wavelength.device).float() - first) / width).clamp(0, 1)
    kept = 1 - ramp
    return (1.0 / (scaling.factor * wavelength)) * (1 - kept) + (1.0 / wavelength) * kept


def _yarn_amplitude(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _temperature(scaling.factor, scaling.mscale) / _temperature(
            scaling.factor, scaling.mscale_all_dim
        )
    return _temperature(scaling.factor, 1.0)


def latent_score_factor(scaling: RopeScaling | None) -> float:
    """Factor on MLA's scores: DeepSeek's temperature of all channels, on query and key alike."""
    if scaling is None or not scaling.mscale_all_dim:
        return 1.0
    return _temperature(scaling.factor, scaling.mscale_all_dim) ** 2


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn heads x (N, H, D) by the angles of their positions, cos and sin (N, D/2).

    Interleaved pairs come out in the order of the others, first channels before second ones: a
    score does not change when query and key are reordered alike.
    """
    x_float = x.float()
    if interleaved:
        first, second = x_float.unflatten(-1, (-1, 2)).unbind(-1)  # (N, H, D/2) each
    else:
        first, second = x_float.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (N, 1, D/2)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
