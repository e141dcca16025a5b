"""The optimizer of a run, and which weights it decays."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer

from astrai_core.model.layers import Embedding
from astrai_core.model.moe import Router
from astrai_train.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What turns gradients into updates.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW (arXiv 1711.05101); or Muon for the matrices of the blocks, with AdamW for the rest,
    which learns from fewer tokens and wants an lr of about 0.02."""
    lr: float = 1e-3
    """Peak learning rate; the schedule scales it."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and embeddings are never decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    momentum: float = 0.95
    """muon: decay rate of the running mean of a matrix's gradient."""
    adamw_lr: float = 4e-3
    """muon: peak learning rate of all that AdamW moves: output layer, routers, norms and biases."""
    embedding_lr: float | None = None
    """muon: peak learning rate of an embedding that is not the output layer too; null takes
    adamw_lr."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more, not {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be from 0 to below 1, not {self.betas}")
        if not self.eps > 0:
            raise ValueError(f"eps must be above 0, not {self.eps}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be from 0 to below 1, not {self.momentum}")
        if not self.adamw_lr > 0:
            raise ValueError(f"adamw_lr must be above 0, not {self.adamw_lr}")
        if self.embedding_lr is not None and not self.embedding_lr > 0:
            raise ValueError(f"embedding_lr must be above 0 or null, not {self.embedding_lr}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split what is trained into decayed matrices and the rest, each in the model's own order."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, Embedding | nn.Embedding)}
    decayed, free = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if is_matrix else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def muon_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split what is trained into matrices of the blocks, embeddings alone, and the rest.

    Muon is for matrices that map one hidden space to another. The output layer is none, nor is an
    embedding; one that is both learns at the pace of an output layer. Nor is a router, whose
    rows stand for one expert each.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, Embedding | nn.Embedding)}
    output = getattr(model, "output_weight", None)
    routers = {id(m.weight) for m in model.modules() if isinstance(m, Router)}
    hidden, tables, rest = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings and parameter is not output:
            tables.append(parameter)
        elif parameter.ndim == 2 and parameter is not output and id(parameter) not in routers:
            hidden.append(parameter)
        else:
            rest.append(parameter)
    shared = {"weight_decay": 0.0, "orthogonal": False}
    groups = [
        {
            "params": hidden,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "orthogonal": True,
        },
        {"params": tables, "lr": config.embedding_lr or config.adamw_lr, **shared},
        {"params": rest, "lr": config.adamw_lr, **shared},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool = True) -> Optimizer:
    """Build the optimizer over the trained parameters of a model.

    Args:
        model: its parameters are updated.
        config: which optimizer and how.
        fused: one kernel for all parameters, on a CPU a tenth of the time of the loop; false
            where a gradient scaler must see the gradients first (fp16).
    """
    if config.name == "muon":
        return Muon(muon_groups(model, config), config.momentum, config.betas, config.eps)
    groups = parameter_groups(model, config.weight_decay)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
