"""Latent attention on packed weights in two operators, with the attention itself between them.

`packed_latent.cpp` says what is computed.

N tokens, H heads. r latent width, P unrotated ("nope") width, R rotated width, V value width.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from astrai_core.model.attention import Rotation
from astrai_core.model.attention_context import AttentionContext
from astrai_core.model.packed import PackedLinear, why_not_packed
from astrai_core.model.quantization import native
from astrai_core.model.rowwise import RowwiseMLA

_SOURCE = Path(__file__).with_name("packed_latent.cpp")


class PackedMLA(nn.Module):
    """A `RowwiseMLA` without a gate; what it computes is got by `function`.

    Args:
        attention: its layers are packed and have no biases.
    """

    to_latent: Tensor
    to_value: Tensor

    def __init__(self, attention: RowwiseMLA):
        super().__init__()
        self.layer, self.window = attention.layer, attention.window
        self.rank, self.scale = attention.rank, attention.scale
        self.is_interleaved = attention.is_interleaved
        self.q_proj = attention.q_proj
        self.q_a_proj, self.q_b_proj = attention.q_a_proj, attention.q_b_proj
        self.q_a_layernorm, self.kv_a_layernorm = attention.q_a_layernorm, attention.kv_a_layernorm
        self.kv_a_proj_with_mqa, self.o_proj = attention.kv_a_proj_with_mqa, attention.o_proj
        # outputs side by side, as `float_products.h` reads them
        to_latent = attention.to_latent.transpose(1, 2).contiguous()
        to_value = attention.to_value.transpose(1, 2).contiguous()
        self.register_buffer("to_latent", to_latent)  # (H, P, r)
        self.register_buffer("to_value", to_value)  # (H, r, V)

    def function(
        self, norm_weight: Tensor, norm_eps: float
    ) -> Callable[[Tensor, Rotation, AttentionContext], Tensor]:
        """The stream (N, dim) plus the attention to it, its norm included."""
        operators = torch.ops.astrai_packed_latent
        project, add = operators.queries.default, operators.add_output.default
        first, second, norm = self.q_proj, None, None
        if first is None:
            first, second, norm = self.q_a_proj, self.q_b_proj, self.q_a_layernorm
        kv_norm = self.kv_a_layernorm
        given = (
            *(norm_weight, norm_eps, *_weights_of(first)),
            *((None, 0.0) if norm is None else (norm.weight, norm.norm_eps)),
            *((None, None) if second is None else _weights_of(second)),
            *(*_weights_of(self.kv_a_proj_with_mqa), kv_norm.weight, kv_norm.norm_eps),
            self.to_latent,
        )
        output = (self.to_value, *_weights_of(self.o_proj))
        layer, rank, scale, window = self.layer, self.rank, self.scale, self.window
        is_interleaved = self.is_interleaved

        def attend(x: Tensor, rotation: Rotation, context: AttentionContext) -> Tensor:
            q, k = project(x, *given, *rotation, is_interleaved)  # (N, H, r + R), (N, 1, r + R)
            mixed = context.attend(layer, q, k, rank, scale=scale, window=window)  # (N, H, r)
            return add(x, mixed.contiguous(), *output)

        return attend


def _weights_of(layer: nn.Module | None) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, PackedLinear)
    assert layer.bias is None
    return layer.weight, layer.weight_scale


@functools.cache
def why_not_packed_latent() -> str | None:
    """What this machine lacks for packed latent attention, in words; None where it runs."""
    return why_not_packed() or native.why_not(_SOURCE)
