"""Muon: the momentum of a hidden matrix, made orthogonal, is the step (Keller Jordan, 2024).

A gradient matrix is dominated by a few directions. Setting all its singular values to about one
lets the rare directions learn as fast, which on small models about halves the steps to a loss.
Embeddings, the output layer, norms and biases are no such matrices: AdamW moves them.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

# a quintic a x + b x^3 + c x^5 that takes any x in (0, 1] to about 1 in five rounds
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5

_Pair = tuple[Tensor, Tensor]
"""A parameter and its gradient."""


class Muon(Optimizer):
    """Muon for the groups that say `orthogonal`, AdamW for the others.

    Args:
        groups: parameter groups with `lr`, `weight_decay` and `orthogonal`.
        momentum: decay rate of the mean of a matrix's gradients.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": eps})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            pairs = [(one, one.grad) for one in group["params"] if one.grad is not None]
            if group["orthogonal"]:
                self._step_orthogonal(pairs, group)
            elif pairs:
                self._step_adamw(pairs, group)
        return loss

    def _step_orthogonal(self, pairs: list[_Pair], group: dict[str, Any]) -> None:
        shapes: dict[torch.Size, list[_Pair]] = {}
        for parameter, gradient in pairs:
            shapes.setdefault(parameter.shape, []).append((parameter, gradient))
        lr, momentum = group["lr"], group["momentum"]
        # one iteration for all matrices of a shape: small products alone leave cores idle
        for (rows, columns), alike in shapes.items():
            ahead = []
            for parameter, gradient in alike:
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                state["mean"].lerp_(gradient, 1 - momentum)
                ahead.append(gradient.lerp(state["mean"], momentum))  # Nesterov's
            # outputs of a tall matrix would move less than those of a wide one
            scale = max(1.0, rows / columns) ** 0.5
            updates = orthogonalised(torch.stack(ahead))
            for (parameter, _), update in zip(alike, updates, strict=True):
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * scale)

    def _step_adamw(self, pairs: list[_Pair], group: dict[str, Any]) -> None:
        states = []
        for parameter, _ in pairs:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            states.append(state)
        beta1, beta2 = group["betas"]
        adamw(
            [parameter for parameter, _ in pairs],
            [gradient for _, gradient in pairs],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalised(matrices: Tensor) -> Tensor:
    """The matrices (K, R, C) with all singular values between about 0.7 and 1.2.

    Newton and Schulz's iteration, on the narrower side, where the products are smaller.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        square = x @ x.mT  # (K, S, S), S the smaller of R and C
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
