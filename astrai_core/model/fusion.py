"""The same model in fewer, larger operators, for inference over weights of its own.

    q_proj, k_proj, v_proj  -> one product;  q_norm, k_norm and the rotation -> one operator
    gate_proj, up_proj      -> one product;  silu and the product           -> one operator
    RMSNorm                 -> one operator

A small model's step is bound by the number of its operators. The rows of the joined matrices are
those of the parts, quantised or not. A model whose tensors are shared, with a trainer say, is not
fused: the joined matrices are copies.

N tokens, H and KV heads of width D, F width of the MLP.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from astrai_core.model.attention import GQA, Rotation, apply_gate
from astrai_core.model.attention_context import AttentionContext
from astrai_core.model.feed_forward import MLP
from astrai_core.model.layers import Linear, RMSNorm
from astrai_core.model.quantization import Int4Linear, Int8Linear, W8A8Linear, native
from astrai_core.model.transformer import Transformer

_SOURCE = Path(__file__).with_name("fusion.cpp")


class FusedRMSNorm(nn.Module):
    """An `RMSNorm` of rows (N, dim)."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.norm_eps = norm.norm_eps
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, dim)."""
        return torch.ops.astrai_fusion.rms_norm(x, self.weight, self.norm_eps)


class FusedGQA(nn.Module):
    """A `GQA` with one projection to queries, keys and values."""

    def __init__(self, attention: GQA):
        super().__init__()
        self.layer, self.window = attention.layer, attention.window
        self.n_heads, self.n_kv_heads = attention.n_heads, attention.n_kv_heads
        self.head_dim = attention.head_dim
        self.is_interleaved = attention.is_interleaved
        self.qkv_proj = joined((attention.q_proj, attention.k_proj, attention.v_proj))
        self.o_proj, self.gate_proj = attention.o_proj, attention.gate_proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, x: Tensor, rotation: Rotation, attention: AttentionContext) -> Tensor:
        """Map the normed block input (N, dim) to the attention's output (N, dim)."""
        q, k, v = torch.ops.astrai_fusion.heads(
            self.qkv_proj(x),
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            *rotation,
            self.n_heads,
            self.n_kv_heads,
            0.0 if self.q_norm is None else self.q_norm.norm_eps,
            self.is_interleaved,
        )  # (N, H, D), (N, KV, D), (N, KV, D)
        out = attention.attend(
            self.layer, q, k, v, scale=self.head_dim**-0.5, window=self.window
        )  # (N, H, D)
        if self.gate_proj is not None:
            out = apply_gate(out, self.gate_proj(x))
        return self.o_proj(out.flatten(1))


class FusedMLP(nn.Module):
    """An `MLP` with one projection to gate and up."""

    def __init__(self, mlp: MLP):
        super().__init__()
        self.gate_up_proj = joined((mlp.gate_proj, mlp.up_proj))
        self.down_proj = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, dim) to (N, dim)."""
        return self.down_proj(torch.ops.astrai_fusion.gated(self.gate_up_proj(x)))


def fuse_(model: Transformer) -> Transformer:
    """Fuse what can be fused, in place; without our compiled operators nothing is.

    MLA's projections and experts stay as they are, but for the norms of the residual stream.
    """
    if model.device.type != "cpu" or why_not_fused() is not None:
        return model
    for owner in (model, *model.layers):
        for name, child in list(owner.named_children()):
            if isinstance(child, RMSNorm):
                setattr(owner, name, FusedRMSNorm(child))
            elif isinstance(child, GQA) and are_alike(child.q_proj, child.k_proj, child.v_proj):
                setattr(owner, name, FusedGQA(child))
            elif isinstance(child, MLP) and are_alike(child.gate_proj, child.up_proj):
                setattr(owner, name, FusedMLP(child))
    return model


@functools.cache
def why_not_fused() -> str | None:
    """What this machine lacks for the compiled operators, in words; None where they run."""
    try:
        native.load_source(_SOURCE)
    except native.NativeError as error:
        return str(error)
    return None


def are_alike(*layers: nn.Module) -> bool:
    """Whether layers can be joined: of one kind that is known here, adapters are not."""
    kinds = {type(layer) for layer in layers}
    return len(kinds) == 1 and kinds <= {Linear, W8A8Linear, Int8Linear, Int4Linear}


def joined(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer whose outputs are those of several alike, one after the other."""
    biases = [layer.bias for layer in layers if isinstance(layer.bias, Tensor)]
    bias = torch.cat(biases).detach() if biases else None
    weight = torch.cat([_tensor(layer, "weight") for layer in layers])
    form = type(layers[0])
    if issubclass(form, W8A8Linear | Int8Linear | Int4Linear):
        return form(weight, torch.cat([_tensor(layer, "weight_scale") for layer in layers]), bias)
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear


def _tensor(layer: nn.Module, name: str) -> Tensor:
    tensor = getattr(layer, name)
    assert isinstance(tensor, Tensor), f"a layer without {name}"
    return tensor.detach()
