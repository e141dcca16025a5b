"""LoRA (arXiv 2106.09685): a frozen layer, and a small one beside it that learns.

    y = W x + s B A dropout(x),    s = alpha / r  (alpha / sqrt(r) with rslora)

W (out, in) may be of any number format, quantised too; A (r, in) and B (out, r) are float32. B
starts at zero, so that a model begins as what its base is. What the base computes alone is one
`with lora_disabled(model):` away, which is how DPO and GRPO get a reference without a copy.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astrai_core.model.layers import Linear

ALL_LINEAR = "all-linear"
_HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers are adapted, and by how much.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    rank: int = 16
    """Rows of A and columns of B: how much a layer can learn, and what that costs."""
    alpha: float = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that training drops."""
    targets: list[str] | str = ALL_LINEAR
    """Names of the layers, or the ends of names: [q_proj, mlp.down_proj]. all-linear is every
    linear layer but the output layer and the experts that a router chooses from."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732), for ranks of 64 and more."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be 1 or more, not {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be from 0 to below 1, not {self.dropout}")
        if not self.targets or (isinstance(self.targets, str) and self.targets != ALL_LINEAR):
            raise ValueError(
                f"lora.targets must be {ALL_LINEAR} or a list of names as [q_proj, v_proj], "
                f"not {self.targets!r}"
            )

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a model's adapters are, and what they were trained on."""

    config: LoRAConfig
    base: Path | None
    """The base's folder, where it is known."""
    base_digest: str | None
    """SHA-256 over the base's weight files, where it is known."""


class LoRALinear(nn.Module):
    """Takes the place of a `Linear`, or of a quantised one, and keeps it as `base`."""

    def __init__(self, base: nn.Module, config: LoRAConfig):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = _shape(base)
        self.scale, self.dropout = config.scale, config.dropout
        self.is_enabled = True
        device = next(tensor.device for tensor in base.state_dict().values())
        make = {"dtype": torch.float32, "device": device}
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, **make))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, config.rank, **make))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A uniformly from +-1 / sqrt(in); zero B."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out) in the type of the base."""
        out = self.base(x)
        if not self.is_enabled:
            return out
        dropped = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        return out + (F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scale).to(
            out.dtype
        )

    @property
    def weight(self) -> Tensor:
        """The matrix of the whole layer (out, in), for those who multiply by it themselves.

        Raises:
            TypeError: the base is quantised, so that there is no such matrix.
        """
        return self._sum() if self.is_enabled else self._plain_base().weight

    @torch.no_grad()
    def merged(self) -> Linear:
        """Return the base with the adapter added to its weight, which is changed in place.

        Raises:
            TypeError: the base is quantised.
        """
        base = self._plain_base()
        base.weight.copy_(self._sum())
        return base

    def _sum(self) -> Tensor:
        weight = self._plain_base().weight
        added = (self.lora_B @ self.lora_A) * self.scale
        return (weight.to(added.dtype) + added).to(weight.dtype)

    def _plain_base(self) -> Linear:
        if not isinstance(self.base, Linear):
            raise TypeError(
                f"a {type(self.base).__name__} has no matrix to add an adapter to; merge adapters "
                "before quantising"
            )
        return self.base


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze a model and put adapters around its layers, in place.

    Raises:
        ValueError: a target is no linear layer of the model, or there are adapters already.
    """
    if lora_layers(model):
        raise ValueError("the model has adapters already; merge them before adding others")
    layers = linear_layers(model)
    chosen = _choose(layers, config)
    model.requires_grad_(False)
    for name in chosen:
        _replace(model, name, LoRALinear(layers[name], config).train(layers[name].training))


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to the weight beside it, in place; the model is a plain one again.

    Nothing happens to a model without adapters.

    Raises:
        TypeError: a base is quantised.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        _replace(model, name, layer.merged())
    if layers:
        model.requires_grad_(True)
        # a Transformer's, which stands above this file
        model.adapter = None  # pyright: ignore[reportArgumentType]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that can be adapted, by name."""
    return {name: layer for name, layer in model.named_modules() if _is_linear(layer)}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}


@contextlib.contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Run a model as its base alone within the block.

        with torch.no_grad(), lora_disabled(model):
            reference = model(ids)["logits"]

    Numbers are those of the model without adapters, bit for bit. A compiled forward pass is
    compiled once more for it. Nothing happens to a model without adapters: ask `lora_layers`.
    """
    before = [(layer, layer.is_enabled) for layer in lora_layers(model).values()]
    try:
        for layer, _ in before:
            layer.is_enabled = False
        yield
    finally:
        for layer, was_enabled in before:
            layer.is_enabled = was_enabled


def _choose(layers: dict[str, nn.Module], config: LoRAConfig) -> list[str]:
    if config.targets == ALL_LINEAR:
        return [name for name in layers if name != _HEAD and ".experts." not in f".{name}"]
    chosen: set[str] = set()
    for target in config.targets:
        found = {name for name in layers if f".{name}".endswith(f".{target}")}
        if not found:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"lora.targets: the model has no linear layer {target!r}; it has {', '.join(known)}"
            )
        chosen |= found
    if _HEAD in chosen and config.dropout:
        # losses multiply by the output layer's matrix themselves, in pieces
        raise ValueError(f"lora.targets: {_HEAD} cannot have dropout; set lora.dropout to 0")
    return [name for name in layers if name in chosen]


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, Linear) or hasattr(layer, "from_linear")


def _shape(base: nn.Module) -> tuple[int, int]:
    in_features, out_features = base.in_features, base.out_features
    assert isinstance(in_features, int)
    assert isinstance(out_features, int)
    return in_features, out_features


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
