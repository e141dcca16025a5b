"""A mixture of experts on packed weights in one operator, its router and the block's norm included.

The weights of all experts lie one after the other, so that the operator is given four tensors and
not four for each expert. `packed_experts.cpp` says what is computed.

N tokens, E experts of width F; P panels of 64 outputs, S steps of 4 inputs.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from astrai_core.model.moe import Router, Routing
from astrai_core.model.packed import PackedLinear, why_not_packed
from astrai_core.model.quantization import native

_SOURCE = Path(__file__).with_name("packed_experts.cpp")

Pair = tuple[PackedLinear, PackedLinear]
"""A network's layers without biases: gate and up joined, and down."""


class PackedMoE(nn.Module):
    """A `DeepSeekMoE` at inference; what it computes is got by `function`.

    Args:
        router: scores the experts, and its config says how they are chosen.
        experts: the networks that are chosen among.
        shared: the network that every token visits, if there is one.
    """

    scheme = "w8a8"

    router: Tensor
    bias: Tensor | None
    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    def __init__(self, router: Router, experts: list[Pair], shared: Pair | None):
        super().__init__()
        self.config = router.config
        self.register_buffer("router", router.weight.detach().float().t().contiguous())  # (dim, E)
        self.register_buffer("bias", router.e_score_correction_bias)  # (E,)
        for name, layers in zip(("gate_up", "down"), zip(*experts, strict=True), strict=True):
            weights, scales = zip(*((one.weight, one.weight_scale) for one in layers), strict=True)
            self.register_buffer(name, torch.stack(weights))  # (E, P, S, 64, 4)
            self.register_buffer(f"{name}_scale", torch.stack(scales))  # (E, 2F) or (E, dim)
        self.shared_experts = None if shared is None else nn.ModuleList(shared)

    def function(
        self, norm_weight: Tensor, norm_eps: float
    ) -> Callable[[Tensor, list[Routing] | None], Tensor]:
        """The stream (N, dim) plus the experts' output for it, its norm included.

        What the router decided is added to the list, if there is one.
        """
        operator, config = torch.ops.astrai_packed_experts.moe.default, self.config
        choice = (
            config.n_expert_groups,
            config.n_activated_groups,
            config.n_activated_experts,
            config.moe_scoring == "softmax",
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
        of_shared = [None] * 4
        if self.shared_experts is not None:
            of_shared = [t for one in self.shared_experts for t in (one.weight, one.weight_scale)]
        given = (
            *(norm_weight, norm_eps, self.router, self.bias, *choice),
            *(self.gate_up, self.gate_up_scale, self.down, self.down_scale, *of_shared),
        )

        def add(x: Tensor, routings: list[Routing] | None) -> Tensor:
            out, scores, experts, weights = operator(x, *given)
            if routings is not None:
                routings.append(Routing(scores=scores, experts=experts, weights=weights))
            return out

        return add


@functools.cache
def why_not_packed_experts() -> str | None:
    """What this machine lacks for packed experts, in words; None where they run."""
    return why_not_packed() or native.why_not(_SOURCE)
