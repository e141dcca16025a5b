"""The same model in fewer, larger operators, for inference over weights of its own.

    q_proj, k_proj, v_proj  -> one product;  q_norm, k_norm and the rotation -> one operator
    gate_proj, up_proj      -> one product;  silu and the product           -> one operator
    RMSNorm                 -> one operator

and, where int8 weights can be packed, in three operators a block and attention between them:
`packed.cpp` says which, `packed_latent.cpp` for latent attention and `packed_experts.cpp` for
experts. Otherwise layers in float32, latent attention and experts become those of `rowwise.py`.

A small model's step is bound by the number of its operators and by the Python between them: what
a block calls is looked up once, here, and not through modules in each step. The rows of the joined
matrices are those of the parts, quantised or not. A model whose tensors are shared, with a trainer
say, is not fused: the joined matrices are copies.

N tokens, H and KV heads of width D, F width of the MLP.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from astrai_core.model.attention import GQA, MLA, Rotation
from astrai_core.model.attention_context import AttentionContext
from astrai_core.model.feed_forward import MLP
from astrai_core.model.layers import Linear, RMSNorm
from astrai_core.model.moe import DeepSeekMoE, Routing
from astrai_core.model.packed import PackedLinear, pack_, why_not_packed
from astrai_core.model.packed_experts import PackedMoE, why_not_packed_experts
from astrai_core.model.packed_latent import PackedMLA, why_not_packed_latent
from astrai_core.model.quantization import Int4Linear, Int8Linear, W8A8Linear, native
from astrai_core.model.rotary import TabulatedRotary
from astrai_core.model.rowwise import RowwiseMLA, RowwiseMoE, rowwise_, why_not_rowwise
from astrai_core.model.transformer import DecoderBlock, Transformer

_SOURCE = Path(__file__).with_name("fusion.cpp")

Rowwise = Callable[[Tensor], Tensor]
Attend = Callable[[Tensor, Rotation, AttentionContext], Tensor]
Feed = Callable[[Tensor, list[Routing] | None], Tensor]


class FusedRMSNorm(nn.Module):
    """An `RMSNorm` of rows (N, dim)."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.norm_eps = norm.norm_eps
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, dim)."""
        return torch.ops.astrai_fusion.rms_norm(x, self.weight, self.norm_eps)

    def function(self) -> Rowwise:
        """What `forward` computes, without looking anything up."""
        operator, weight, eps = torch.ops.astrai_fusion.rms_norm.default, self.weight, self.norm_eps
        return lambda x: operator(x, weight, eps)


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
        self._weights = [n if n is None else n.weight for n in (self.q_norm, self.k_norm)]
        eps = 0.0 if self.q_norm is None else self.q_norm.norm_eps
        self._sizes = (self.n_heads, self.n_kv_heads, eps, self.is_interleaved)

    def forward(self, x: Tensor, rotation: Rotation, attention: AttentionContext) -> Tensor:
        """Map the normed block input (N, dim) to the attention's output (N, dim)."""
        q, k, v = torch.ops.astrai_fusion.heads(
            self.qkv_proj(x), *self._weights, *rotation, *self._sizes
        )  # (N, H, D), (N, KV, D), (N, KV, D)
        out = attention.attend(
            self.layer, q, k, v, scale=self.head_dim**-0.5, window=self.window
        )  # (N, H, D)
        if self.gate_proj is not None:
            out = torch.ops.astrai_fusion.gate_heads(out, self.gate_proj(x))
        return self.o_proj(out.flatten(1))

    def packed(self, norm: FusedRMSNorm) -> Callable[[Tensor, Tensor, Tensor], list[Tensor]]:
        """The stream (N, dim), cosines and sines to q, k and v, its norm included."""
        operator, weights, sizes = torch.ops.astrai_packed.qkv.default, self._weights, self._sizes
        before = norm.weight, norm.norm_eps, self.qkv_proj.weight, self.qkv_proj.weight_scale
        return lambda x, cos, sin: operator(x, *before, *weights, cos, sin, *sizes)


class FusedMLP(nn.Module):
    """An `MLP` with one projection to gate and up."""

    def __init__(self, mlp: MLP):
        super().__init__()
        self.gate_up_proj = joined((mlp.gate_proj, mlp.up_proj))
        self.down_proj = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, dim) to (N, dim)."""
        return self.down_proj(torch.ops.astrai_fusion.gated(self.gate_up_proj(x)))


class FusedBlock(nn.Module):
    """A `DecoderBlock` of fused parts; what is no attention of ours or MLP is called as it is."""

    def __init__(self, block: DecoderBlock):
        super().__init__()
        self.input_layernorm = FusedRMSNorm(block.input_layernorm)
        self.self_attn = block.self_attn
        if isinstance(block.self_attn, GQA) and are_alike(
            block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj
        ):
            self.self_attn = FusedGQA(block.self_attn)
        elif isinstance(block.self_attn, MLA) and why_not_rowwise() is None:
            self.self_attn = fused_mla(block.self_attn)
        self.post_attention_layernorm = FusedRMSNorm(block.post_attention_layernorm)
        self.mlp = block.mlp
        if isinstance(block.mlp, MLP):
            self.mlp = fused_mlp(block.mlp)
        elif isinstance(block.mlp, DeepSeekMoE) and why_not_rowwise() is None:
            self.mlp = fused_moe(block.mlp)
        self.prepare()

    def pack_(self) -> None:
        """Pack the layers, and put what becomes one operator in its place."""
        pack_(self)
        if isinstance(self.self_attn, RowwiseMLA):
            self.self_attn = packed_mla(self.self_attn) or self.self_attn
        if isinstance(self.mlp, RowwiseMoE):
            self.mlp = packed_moe(self.mlp) or self.mlp
        self.prepare()

    def prepare(self) -> None:
        """Look up what `forward` calls; to be repeated when a layer below has changed."""
        self._add_attention = _attention_of(self.input_layernorm, self.self_attn)
        self._add_mlp = _mlp_of(self.post_attention_layernorm, self.mlp)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        attention: AttentionContext,
        routings: list[Routing] | None = None,
    ) -> Tensor:
        """Map the residual stream (N, dim) to the next block's; a router adds to `routings`."""
        return self._add_mlp(self._add_attention(x, rotation, attention), routings)


def fused_mla(attention: MLA) -> RowwiseMLA:
    """Latent attention whose norms and folded products are our own operators."""
    norm = attention.q_a_layernorm
    return RowwiseMLA(
        attention,
        None if norm is None else FusedRMSNorm(norm),
        FusedRMSNorm(attention.kv_a_layernorm),
    )


def fused_mlp(mlp: MLP) -> nn.Module:
    """The network itself where its two first layers cannot be joined."""
    return FusedMLP(mlp) if are_alike(mlp.gate_proj, mlp.up_proj) else mlp


def fused_moe(experts: DeepSeekMoE) -> RowwiseMoE:
    """Experts as fused networks, chosen and added up by our own operators."""
    networks = experts.experts
    for n, expert in enumerate(networks):  # one by one: the weights are never there twice
        assert isinstance(expert, MLP)
        networks[n] = fused_mlp(expert)
    shared = experts.shared_experts
    return RowwiseMoE(experts, networks, None if shared is None else fused_mlp(shared))


def packed_mla(attention: RowwiseMLA) -> PackedMLA | None:
    """The same attention in two operators; None if it has a gate or a layer is not plain."""
    layers = (
        attention.q_proj, attention.q_a_proj, attention.q_b_proj, attention.kv_a_proj_with_mqa,
        attention.o_proj,
    )  # fmt: skip
    is_plain = all(layer is None or _is_plain(layer) for layer in layers)
    if attention.gate_proj is not None or not is_plain or why_not_packed_latent() is not None:
        return None
    return PackedMLA(attention)


def packed_moe(experts: RowwiseMoE) -> PackedMoE | None:
    """The same experts in one operator; None if one of their layers is not plain."""
    networks, shared = [_pair_of(network) for network in experts.experts], experts.shared_experts
    pairs = [pair for pair in networks if pair is not None]
    of_shared = None if shared is None else _pair_of(shared)
    is_whole = len(pairs) == len(networks) and (shared is None or of_shared is not None)
    if not is_whole or why_not_packed_experts() is not None:
        return None
    return PackedMoE(experts.gate, pairs, of_shared)


def _pair_of(network: nn.Module) -> tuple[PackedLinear, PackedLinear] | None:
    if isinstance(network, FusedMLP):
        first, second = network.gate_up_proj, network.down_proj
        if _is_plain(first) and _is_plain(second):
            return first, second
    return None


def _attention_of(norm: FusedRMSNorm, attention: nn.Module) -> Attend:
    """The stream plus a block's attention to it, in two operators and attention if packed."""
    if isinstance(attention, FusedGQA) and attention.gate_proj is None:
        qkv, output = attention.qkv_proj, attention.o_proj
        if _is_plain(qkv) and _is_plain(output):
            heads, add = attention.packed(norm), torch.ops.astrai_packed.add_linear.default
            layer, window, scale = attention.layer, attention.window, attention.head_dim**-0.5
            weight, weight_scale = output.weight, output.weight_scale

            def attend(x: Tensor, rotation: Rotation, context: AttentionContext) -> Tensor:
                q, k, v = heads(x, *rotation)
                out = context.attend(layer, q, k, v, scale=scale, window=window)
                return add(x, out, weight, weight_scale)

            return attend
    if isinstance(attention, PackedMLA):
        return attention.function(norm.weight, norm.norm_eps)
    normed, forward = norm.function(), attention.forward
    return lambda x, rotation, context: x + forward(normed(x), rotation, context)


def _mlp_of(norm: FusedRMSNorm, mlp: nn.Module) -> Feed:
    """The stream plus a block's feed-forward network of it, in one operator if packed."""
    if (pair := _pair_of(mlp)) is not None:
        operator, (first, second) = torch.ops.astrai_packed.mlp.default, pair
        weights = first.weight, first.weight_scale, second.weight, second.weight_scale
        weight, eps = norm.weight, norm.norm_eps
        return lambda x, _: operator(x, weight, eps, *weights)
    if isinstance(mlp, PackedMoE):
        return mlp.function(norm.weight, norm.norm_eps)
    normed = norm.function()
    if isinstance(mlp, RowwiseMoE | DeepSeekMoE):
        return lambda x, routings: x + mlp(normed(x), routings)
    return lambda x, _: x + mlp(normed(x))


def _is_plain(layer: nn.Module) -> TypeGuard[PackedLinear]:
    return isinstance(layer, PackedLinear) and layer.bias is None


def fuse_(model: Transformer) -> Transformer:
    """Fuse what can be fused, in place; without our compiled operators nothing is."""
    if model.device.type != "cpu" or why_not_fused() is not None:
        return model
    if isinstance(model.norm, FusedRMSNorm):
        return model
    model.add_module("norm", FusedRMSNorm(model.norm))
    for n, block in enumerate(model.layers):
        assert isinstance(block, DecoderBlock)
        model.layers[n] = fused = FusedBlock(block)
        if why_not_packed() is None:  # block by block: the weights are never there twice
            fused.pack_()
    if why_not_packed() is None:
        pack_(model)
    model.rotary_embedding = TabulatedRotary(model.rotary_embedding, model.config.max_len)
    # compiled only where a layer needs it
    has_plain = model.dtype is torch.float32 and any(type(m) is Linear for m in model.modules())
    if has_plain and why_not_rowwise() is None:
        rowwise_(model)
    return model


@functools.cache
def why_not_fused() -> str | None:
    """What this machine lacks for the compiled operators, in words; None where they run."""
    return native.why_not(_SOURCE)


def are_alike(*layers: nn.Module) -> bool:
    """Whether layers can be joined: of one kind that is known here, adapters are not."""
    kinds = {type(layer) for layer in layers}
    return len(kinds) == 1 and kinds <= {Linear, W8A8Linear, Int8Linear, Int4Linear}


def joined(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer whose outputs are those of several alike, one after the other."""
    biases = [layer.bias for layer in layers if isinstance(layer.bias, Tensor)]
    bias = torch.cat(biases).detach() if biases else None
    weights = [_tensor(layer, "weight") for layer in layers]
    form = type(layers[0])
    if issubclass(form, W8A8Linear | Int8Linear | Int4Linear):
        scale = torch.cat([_tensor(layer, "weight_scale") for layer in layers])
        if form is W8A8Linear and why_not_packed() is None:  # without joining them first
            return PackedLinear(weights, scale, bias)
        return form(torch.cat(weights), scale, bias)
    weight = torch.cat(weights)
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear


def _tensor(layer: nn.Module, name: str) -> Tensor:
    tensor = getattr(layer, name)
    assert isinstance(tensor, Tensor), f"a layer without {name}"
    return tensor.detach()
