"""Keeps the experts of a mixture evenly loaded while it trains.

Without a loss (arXiv 2408.15664): each optimizer step moves the bias by which a router chooses,

    bias_e += rate * sign(mean load - load_e)

where a load is counted over the whole accumulation window and all ranks. With one (the
sequence-wise loss of arXiv 2412.19437): `E * sum_e f_e P_e` of each row, f the share of the row's
visits that expert e got and P its mean score. It is taken per row, because a product of two means
over a micro-batch would depend on how rows are put together.

L blocks with experts, E experts, K of a token, B rows, T tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from astrai_core.model import Transformer
from astrai_core.model.moe import Router, Routing


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """How the experts of a mixture are kept evenly loaded.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    bias_update_rate: float = 1e-3
    """How far a step moves the bias of moe_topk_method noaux_tc; 0 leaves it as it is."""
    aux_loss_weight: float = 0.0
    """Weight of the auxiliary loss, which is 1 a block where the load is even; 0 has none."""

    def __post_init__(self) -> None:
        for name in ("bias_update_rate", "aux_loss_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"moe.{name} must be 0 or more, not {getattr(self, name)}")


class RowLoads(NamedTuple):
    """What a forward pass says about its experts."""

    visits: Tensor
    """(L, B, E) int64, without padding."""
    losses: Tensor | None
    """(B,), the auxiliary loss of each row, summed over the blocks."""


def count_loads(
    routings: Sequence[Routing], document_ids: Tensor, *, with_loss: bool
) -> RowLoads | None:
    """Count the visits of each row's experts.

    Args:
        routings: of each block with experts.
        document_ids: (B, T), -1 is padding.
        with_loss: whether the auxiliary loss is wanted.

    Returns:
        None without experts.
    """
    if not routings:
        return None
    is_token = document_ids >= 0  # (B, T)
    visits = torch.stack([_visits(routing, is_token) for routing in routings])
    if not with_loss:
        return RowLoads(visits, None)
    lengths = is_token.sum(1).clamp(min=1)  # (B,)
    losses = torch.stack([_mean_scores(routing, is_token, lengths) for routing in routings])
    shares = visits / (lengths[:, None] * routings[0].experts.shape[1])  # (L, B, E)
    return RowLoads(visits, visits.shape[-1] * (shares * losses).sum((0, 2)))


def _visits(routing: Routing, is_token: Tensor) -> Tensor:
    num_rows, length = is_token.shape
    counts = routing.experts.new_zeros(num_rows, routing.scores.shape[1])
    per_token = is_token[:, :, None].expand(-1, -1, routing.experts.shape[1])
    experts = routing.experts.view(num_rows, length, -1)
    return counts.scatter_add(1, experts.flatten(1), per_token.flatten(1).long())  # (B, E)


def _mean_scores(routing: Routing, is_token: Tensor, lengths: Tensor) -> Tensor:
    scores = routing.scores / routing.scores.sum(-1, keepdim=True)  # of a sigmoid they are not 1
    by_row = scores.view(*is_token.shape, -1) * is_token[:, :, None]  # (B, T, E)
    return by_row.sum(1) / lengths[:, None]


class ExpertBalance:
    """Watches the routers of a model through a window and moves their biases at its end.

    Args:
        model: its routers; one that is frozen keeps its bias.
        config: how.

    Raises:
        ValueError: the options are for a model with experts, and this has none.
    """

    def __init__(self, model: Transformer, config: BalanceConfig):
        self.config = config
        self._routers = [m for m in model.modules() if isinstance(m, Router)]
        if config.aux_loss_weight and not self._routers:
            raise ValueError(
                f"moe.aux_loss_weight {config.aux_loss_weight} is for a model of ffn_type moe; "
                f"this one's is {model.config.ffn_type}"
            )
        self._num_experts = model.config.n_routed_experts
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._loads = self._no_loads()

    def begin_window(self) -> None:
        """Forget what an unfinished window counted."""
        self._losses.clear()
        self._loads = self._no_loads()

    def observe(self, loads: RowLoads, weights: Tensor) -> None:
        """Take what a forward pass said, once for each that is learned from.

        Args:
            loads: its loads.
            weights: (B,), what a row counts in the auxiliary loss.
        """
        self._loads = self._loads.to(loads.visits.device) + loads.visits.sum(1)
        if loads.losses is not None:
            self._losses.append((loads.losses, weights))

    def auxiliary_loss(self, count: Tensor) -> Tensor | float:
        """Return the weighted loss of the rows observed since the last call, times `count`."""
        if not self._losses:
            return 0.0
        losses, weights = (torch.cat(parts) for parts in zip(*self._losses, strict=True))
        self._losses.clear()
        mean = (losses * weights).sum() / weights.sum().clamp(min=1)
        return self.config.aux_loss_weight * count * mean

    @torch.no_grad()
    def end_window(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Move the biases by the window's loads.

        Returns:
            Of the window: how far the busiest expert was above the mean, as a multiple of it and
            averaged over the blocks, and the share of experts that nobody visited. Empty without
            experts.
        """
        if not self._routers:
            return {}
        loads = sum_over_ranks(self._loads).double()  # (L, E)
        self._loads = self._no_loads()
        mean = loads.mean(1, keepdim=True)
        for router, direction in zip(self._routers, (mean - loads).sign(), strict=True):
            bias = router.e_score_correction_bias
            if bias is not None and router.weight.requires_grad:
                bias += self.config.bias_update_rate * direction.to(bias)
        violation = (loads / mean.clamp(min=1)).amax(1) - 1
        return {
            "train/moe_max_violation": violation.mean(),
            "train/moe_idle_experts": (loads == 0).double().mean(),
        }

    def _no_loads(self) -> Tensor:
        return torch.zeros(len(self._routers), self._num_experts, dtype=torch.int64)
