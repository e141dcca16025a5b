"""Layers in floating point whose result for a row depends on that row alone, for inference.

What serves a request must not depend, to the last bit, on what else is computed beside it. A
library's product sums in another order for another number of rows, and its vectorised sigmoid
rounds a number by its place in the tensor. The operators of `rowwise.cpp` do neither, and are at
least as fast where a step has few rows.

N tokens, H heads, I inputs, O outputs, E experts, K experts of a token, R = N * K visits.
MLA: r latent width, P unrotated ("nope") width, R rotated width, V value width.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from astrai_core.model.attention import MLA, Rotation
from astrai_core.model.attention_context import AttentionContext
from astrai_core.model.layers import Embedding, Linear
from astrai_core.model.lora import LoRALinear
from astrai_core.model.moe import DeepSeekMoE, Router, Routing
from astrai_core.model.quantization import native
from astrai_core.model.rotary import rotate

_SOURCE = Path(__file__).with_name("rowwise.cpp")
_TINY = 1e-20  # as `moe.py` adds it to a sum of weights before dividing by it


@functools.cache
def why_not_rowwise() -> str | None:
    """What this machine lacks for these operators, in words; None where they run."""
    return native.why_not(_SOURCE)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (N, I) by a weight (O, I) of float32 or bfloat16: (N, O) in float32."""
    rows = x.float().contiguous()
    return torch.ops.astrai_rowwise.product(rows[:, None], weight[None])[:, 0]


def product_of_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each head of x (N, H, I) by its own weight (H, O, I): (N, H, O) in the type of x."""
    return torch.ops.astrai_rowwise.product(x.float().contiguous(), weight).to(x.dtype)


class RowwiseLinear(nn.Module):
    """A `Linear`, of whose weight it makes no copy."""

    bias: Tensor | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O) in the type of x."""
        out = product(x.reshape(-1, self.in_features), self.weight)
        out = out.view(*x.shape[:-1], self.out_features)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class RowwiseEmbedding(nn.Module):
    """An `Embedding`, of whose matrix it makes no copy."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to (..., I)."""
        return nn.functional.embedding(ids, self.weight)

    def project(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O), as the output layer of a model that ties the two."""
        out = product(x.reshape(-1, x.shape[-1]), self.weight)
        return out.view(*x.shape[:-1], self.weight.shape[0]).to(x.dtype)


def rowwise_(model: nn.Module) -> None:
    """Let every `Linear` and `Embedding` below `model` compute row by row, in place.

    Layers with adapters stay as they are.
    """
    for owner in list(model.modules()):
        if isinstance(owner, LoRALinear):
            continue
        for name, child in list(owner.named_children()):
            if type(child) is Linear:
                setattr(owner, name, RowwiseLinear(child.weight, child.bias))
            elif type(child) is Embedding:
                setattr(owner, name, RowwiseEmbedding(child.weight))


class RowwiseMLA(nn.Module):
    """An absorbed `MLA` whose folded matrices lie ready, in the place of `kv_b_proj`.

    Args:
        attention: gives its parts, quantised or not.
        q_norm: stands for its `q_a_layernorm`, if it has one.
        kv_norm: stands for its `kv_a_layernorm`.
    """

    to_latent: Tensor
    to_value: Tensor

    def __init__(self, attention: MLA, q_norm: nn.Module | None, kv_norm: nn.Module):
        super().__init__()
        self.layer, self.window = attention.layer, attention.window
        self.n_heads, self.rank, self.v_dim = attention.n_heads, attention.rank, attention.v_dim
        self.nope_dim, self.rope_dim = attention.nope_dim, attention.rope_dim
        self.scale, self.is_interleaved = attention.scale, attention.is_interleaved
        self.q_proj = attention.q_proj
        self.q_a_proj, self.q_b_proj = attention.q_a_proj, attention.q_b_proj
        self.q_a_layernorm, self.kv_a_layernorm = q_norm, kv_norm
        self.kv_a_proj_with_mqa = attention.kv_a_proj_with_mqa
        self.o_proj, self.gate_proj = attention.o_proj, attention.gate_proj
        weight = attention.kv_b_proj.weight.detach()
        weight = weight.view(self.n_heads, self.nope_dim + self.v_dim, self.rank)
        to_key, to_value = weight.split((self.nope_dim, self.v_dim), dim=1)
        self.register_buffer("to_latent", to_key.transpose(1, 2).contiguous())  # (H, r, P)
        self.register_buffer("to_value", to_value.contiguous())  # (H, V, r)

    def forward(self, x: Tensor, rotation: Rotation, attention: AttentionContext) -> Tensor:
        """Map the normed block input (N, dim) to the attention's output (N, dim)."""
        q = self._queries(x).view(-1, self.n_heads, self.nope_dim + self.rope_dim)
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        q_rope = rotate(q_rope, *rotation, interleaved=self.is_interleaved)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope_dim), dim=-1)
        latent = self.kv_a_layernorm(latent.contiguous())[:, None]  # (N, 1, r)
        k_rope = rotate(k_rope[:, None], *rotation, interleaved=self.is_interleaved)  # (N, 1, R)
        q = torch.cat((product_of_heads(q_nope, self.to_latent), q_rope), dim=-1)  # (N, H, r + R)
        k = torch.cat((latent, k_rope), dim=-1)  # (N, 1, r + R)
        mixed = attention.attend(
            self.layer, q, k, self.rank, scale=self.scale, window=self.window
        )  # (N, H, r)
        out = product_of_heads(mixed, self.to_value)  # (N, H, V)
        if self.gate_proj is not None:
            out = torch.ops.astrai_fusion.gate_heads(out, self.gate_proj(x))
        return self.o_proj(out.flatten(1))

    def _queries(self, x: Tensor) -> Tensor:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None
        assert self.q_a_layernorm is not None
        assert self.q_b_proj is not None
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))


class RowwiseRouter(Router):
    """A `Router` that chooses for a row by that row alone."""

    def __init__(self, router: Router):
        nn.Module.__init__(self)  # its tensors are those of the other
        self.config = router.config
        self.weight = router.weight
        self.register_buffer("e_score_correction_bias", router.e_score_correction_bias)

    def forward(self, x: Tensor) -> Routing:
        """Choose for (N, dim)."""
        is_softmax = self.config.moe_scoring == "softmax"
        scores = torch.ops.astrai_rowwise.scores(product(x, self.weight), is_softmax)  # (N, E)
        experts = self._choose(scores)
        weights = scores.gather(1, experts)
        if self.config.norm_topk_prob:
            total = functools.reduce(torch.add, weights.unbind(1))  # in one order
            weights = weights / (total[:, None] + _TINY)
        weights = weights * self.config.routed_scaling_factor
        return Routing(scores=scores, experts=experts, weights=weights)


class RowwiseMoE(nn.Module):
    """A `DeepSeekMoE` at inference.

    Args:
        experts: gives its parts, quantised or not.
        networks: stand for its experts.
        shared: stands for its `shared_experts`, if there are any.
    """

    def __init__(self, experts: DeepSeekMoE, networks: nn.ModuleList, shared: nn.Module | None):
        super().__init__()
        self.gate = RowwiseRouter(experts.gate)
        self.experts = networks
        self.shared_experts = shared

    def forward(self, x: Tensor, routings: list[Routing] | None = None) -> Tensor:
        """Map (N, dim) to (N, dim); what the router decided is added to `routings`."""
        routing = self.gate(x)
        if routings is not None:
            routings.append(routing)
        num_chosen = routing.experts.shape[1]
        order = routing.experts.flatten().argsort(stable=True)  # (R,), by expert
        counts = routing.experts.flatten().bincount(minlength=len(self.experts)).tolist()
        visits = x.index_select(0, order // num_chosen).split(counts)
        out = torch.cat(
            [
                expert(rows)
                for expert, rows in zip(self.experts, visits, strict=True)
                if len(rows) > 0
            ]
        )
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        places = places.view(-1, num_chosen)
        mixed = torch.ops.astrai_rowwise.mix(out, places, routing.weights.contiguous()).to(x.dtype)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)
