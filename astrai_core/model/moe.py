"""DeepSeekMoE (arXiv 2401.06066): experts that every token visits, and experts chosen for it.

    y = shared(x) + sum over the K chosen experts e of weight_e * expert_e(x)

Which experts are chosen may depend on a bias that balances their loads; their weights never do.

The experts are plain `MLP`s, so that a layer inside can be quantised or adapted like any other.
While all their layers are still `Linear`, an operator multiplies a layer of all experts at once,
which a compiled graph holds; otherwise each expert is called on its tokens.

N tokens, E routed experts, G groups of them, K experts of a token, R = N * K visits.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astrai_core.model.config import ModelConfig
from astrai_core.model.feed_forward import MLP
from astrai_core.model.layers import Linear, draw_

# added to a sum of weights before dividing by it, as DeepSeek does
_TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a router decided."""

    scores: Tensor
    """(N, E) float32, before any bias."""
    experts: Tensor
    """(N, K), the chosen ones, in no particular order."""
    weights: Tensor
    """(N, K) float32, of the experts' outputs."""


class Router(nn.Module):
    """Scores each token's experts in float32 and chooses the best of them."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))
        has_bias = config.moe_topk_method == "noaux_tc"
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if has_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight; zero the bias."""
        draw_(self.weight)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, x: Tensor) -> Routing:
        """Choose for (N, dim)."""
        # a rounded logit can choose another expert, so autocast stays outside
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # (N, E)
        is_softmax = self.config.moe_scoring == "softmax"
        scores = logits.softmax(-1) if is_softmax else logits.sigmoid()
        experts = self._choose(scores.detach())
        weights = scores.gather(1, experts)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        weights = weights * self.config.routed_scaling_factor
        return Routing(scores=scores, experts=experts, weights=weights)

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the experts (N, K) of the best groups with the best scores (N, E)."""
        config = self.config
        num_best = 1  # of a group, whose scores are the group's
        if self.e_score_correction_bias is not None:
            scores, num_best = scores + self.e_score_correction_bias, 2
        if config.n_activated_groups < config.n_expert_groups:
            grouped = scores.unflatten(1, (config.n_expert_groups, -1))  # (N, G, E / G)
            of_group = grouped.topk(num_best, dim=-1).values.sum(-1)  # (N, G)
            chosen = of_group.topk(config.n_activated_groups, dim=-1).indices
            is_out = torch.ones_like(of_group, dtype=torch.bool).scatter(1, chosen, False)
            # not 0: a biased score may lie below it
            scores = grouped.masked_fill(is_out[:, :, None], -torch.inf).flatten(1)
        return scores.topk(config.n_activated_experts, dim=-1).indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # steps of the bias are too small for bfloat16, so it is float32 whatever the model becomes
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self


class DeepSeekMoE(nn.Module):
    """Takes the place of a block's `MLP`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = nn.ModuleList(
            MLP(config.dim, config.dim_ffn_expert) for _ in range(config.n_routed_experts)
        )
        width = config.dim_ffn_expert * config.n_shared_experts
        self.shared_experts = MLP(config.dim, width) if width else None

    def forward(self, x: Tensor, routings: list[Routing] | None = None) -> Tensor:
        """Map (N, dim) to (N, dim).

        Args:
            x: the block's normed stream.
            routings: takes what the router decided, for training to balance.
        """
        routing = self.gate(x)
        if routings is not None:
            routings.append(routing)
        out = self._routed(x, routing).to(x.dtype)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def _routed(self, x: Tensor, routing: Routing) -> Tensor:
        """Sum the chosen experts' outputs, in float32."""
        num_tokens, num_chosen = routing.experts.shape
        visits = routing.experts.flatten()  # (R,)
        order = visits.argsort(stable=True)
        # where each expert's visits end; on the CPU once a layer, not once an expert
        numbers = torch.arange(len(self.experts), device=x.device)
        ends = torch.searchsorted(visits[order], numbers, right=True).cpu()
        # expanded and permuted, rather than gathered by token, because the gradient of that would
        # be a sum in the order of threads
        rows = x[:, None].expand(-1, num_chosen, -1).reshape(-1, x.shape[1])
        out = self._visit(rows.index_select(0, order), ends)
        out = out.index_select(0, order.argsort()).view(num_tokens, num_chosen, -1)
        return (out * routing.weights[:, :, None]).sum(1)

    def _visit(self, x: Tensor, ends: Tensor) -> Tensor:
        """Run the experts over (R, dim), sorted by expert, whose rows end at `ends` (E,)."""
        is_learning = torch.is_grad_enabled()
        if (is_learning or torch.compiler.is_compiling()) and self._is_plain():
            x = _autocast(x)
            experts = cast("list[MLP]", list(self.experts))
            gate = grouped_linear(x, ends, [expert.gate_proj.weight for expert in experts])
            up = grouped_linear(x, ends, [expert.up_proj.weight for expert in experts])
            inner = F.silu(gate) * up
            return grouped_linear(inner, ends, [expert.down_proj.weight for expert in experts])
        return _visit_each(self.experts, x, ends)

    def _is_plain(self) -> bool:
        return all(
            type(layer) is Linear
            for expert in self.experts
            for layer in (expert.gate_proj, expert.up_proj, expert.down_proj)
        )


def _visit_each(experts: nn.ModuleList, x: Tensor, ends: Tensor) -> Tensor:
    # where there are gradients, an expert without visits takes part too: its gradient is then
    # zero rather than absent, which other ranks would wait for
    is_learning = torch.is_grad_enabled()
    return torch.cat(
        [
            expert(x[rows])
            for expert, rows in zip(experts, _slices(ends), strict=True)
            if is_learning or rows.stop > rows.start
        ]
    )


# How many rows an expert has is known when it runs, not compiled. `torch.compiler.disable`
# leaves this mark, but importing the compiler for it costs every start a second and 90 MB.
_visit_each._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]


def _autocast(x: Tensor) -> Tensor:
    """Cast as autocast would for a linear layer."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def grouped_linear(x: Tensor, ends: Tensor, weights: list[Tensor]) -> Tensor:
    """Multiply each expert's rows by its own weight.

    Args:
        x: (R, in), sorted by expert.
        ends: (E,) on the CPU; the rows of expert e are `x[ends[e - 1]:ends[e]]`.
        weights: of each expert (out, in), used in the type of x.

    Returns:
        (R, out) in the type of x.
    """
    return torch.ops.astrai.grouped_linear(x, ends, weights)


def _slices(ends: Tensor) -> list[slice]:
    bounds = [0, *ends.tolist()]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _forward(x: Tensor, ends: Tensor, weights: list[Tensor]) -> Tensor:
    out = x.new_empty(x.shape[0], weights[0].shape[0])
    for rows, weight in zip(_slices(ends), weights, strict=True):
        if rows.stop > rows.start:
            torch.mm(x[rows], weight.to(x.dtype).t(), out=out[rows])
    return out


def _input_gradient(grad: Tensor, ends: Tensor, weights: list[Tensor]) -> Tensor:
    out = grad.new_empty(grad.shape[0], weights[0].shape[1])
    for rows, weight in zip(_slices(ends), weights, strict=True):
        if rows.stop > rows.start:
            torch.mm(grad[rows], weight.to(grad.dtype), out=out[rows])
    return out


def _weight_gradients(grad: Tensor, x: Tensor, ends: Tensor) -> list[Tensor]:
    return [grad[rows].t() @ x[rows] for rows in _slices(ends)]


_LIBRARY = torch.library.Library("astrai", "FRAGMENT")
for _signature, _function in (
    ("grouped_linear(Tensor x, Tensor ends, Tensor[] weights) -> Tensor", _forward),
    ("grouped_linear_input(Tensor grad, Tensor ends, Tensor[] weights) -> Tensor", _input_gradient),
    ("grouped_linear_weights(Tensor grad, Tensor x, Tensor ends) -> Tensor[]", _weight_gradients),
):
    _LIBRARY.define(_signature)
    _LIBRARY.impl(_signature.partition("(")[0], _function, "CompositeExplicitAutograd")


@torch.library.register_fake("astrai::grouped_linear", lib=_LIBRARY)
def _shape_of_output(x: Tensor, ends: Tensor, weights: list[Tensor]) -> Tensor:
    del ends
    return x.new_empty(x.shape[0], weights[0].shape[0])


@torch.library.register_fake("astrai::grouped_linear_input", lib=_LIBRARY)
def _shape_of_input(grad: Tensor, ends: Tensor, weights: list[Tensor]) -> Tensor:
    del ends
    return grad.new_empty(grad.shape[0], weights[0].shape[1])


@torch.library.register_fake("astrai::grouped_linear_weights", lib=_LIBRARY)
def _shape_of_weights(grad: Tensor, x: Tensor, ends: Tensor) -> list[Tensor]:
    return [grad.new_empty(grad.shape[1], x.shape[1]) for _ in range(ends.shape[0])]


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, list[Tensor]], output: Tensor) -> None:
    del output
    x, ends, weights = inputs
    ctx.save_for_backward(x, ends, *weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, list[Tensor | None]]:
    x, ends, *weights = ctx.saved_tensors
    grad = grad.contiguous()
    of_input = torch.ops.astrai.grouped_linear_input(grad, ends, weights)
    if not any(ctx.needs_input_grad[2]):  # adapters are trained around frozen experts
        return of_input, None, [None] * len(weights)
    of_weights = torch.ops.astrai.grouped_linear_weights(grad, x, ends)
    return of_input, None, [g.to(w.dtype) for g, w in zip(of_weights, weights, strict=True)]


torch.library.register_autograd(
    "astrai::grouped_linear", _backward, setup_context=_keep, lib=_LIBRARY
)
