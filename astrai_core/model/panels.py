"""bfloat16 layers in the order in which AVX512-BF16 reads them, for a model that generates.

A weight is packed once for as long as it stays what it is. A step's products then read it from one
end to the other, in up to half the time of torch's products of few rows, and on the threads of our
other operators, so that torch's own can sleep.

N rows, O outputs, I inputs, P panels of 64 outputs.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from astrai_core.model.layers import Embedding, Linear
from astrai_core.model.quantization import native

_SOURCE = Path(__file__).with_suffix(".cpp")
_PANEL = 64


class PanelLinear(nn.Module):
    """A bfloat16 `Linear` whose weight lies in panels.

    Args:
        weight: (O, I) bfloat16, I even.
        bias: (O,), if there is one.
        is_output: return float32, as logits, whose numbers are looked at one by one.
    """

    panels: Tensor
    """(P, I / 2, 64, 2)"""
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, is_output: bool = False):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.is_output = is_output
        self.register_buffer("panels", torch.ops.astrai_panels.pack(weight.contiguous()))
        self.register_buffer("bias", None if bias is None else bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map bfloat16 (..., I) to (..., O)."""
        rows = x.reshape(-1, self.in_features).contiguous()
        out = torch.ops.astrai_panels.linear(rows, self.panels, self.out_features, self.is_output)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)


class PanelEmbedding(nn.Module):
    """An `Embedding` in panels, looked up and multiplied by.

    Args:
        weight: (O, I) bfloat16, I even.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.output = PanelLinear(weight, is_output=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to (..., I)."""
        return self.output.panels[ids // _PANEL, :, ids % _PANEL].flatten(-2)

    def project(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O), as the output layer of a model that ties the two."""
        return self.output(x)


@functools.cache
def why_no_panels() -> str | None:
    """What this machine lacks for panels, in words; None where they run."""
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        return "the processor has no AVX512-BF16"
    return native.why_not(_SOURCE)


def panel_(model: nn.Module) -> None:
    """Put every bfloat16 `Linear` and `Embedding` below `model` into panels, in place."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if not isinstance(child, Linear | Embedding):
                continue
            weight = child.weight.detach()
            if weight.dtype is not torch.bfloat16 or weight.shape[1] % 2:
                continue
            if type(child) is Linear:
                bias = None if child.bias is None else child.bias.detach()
                panels = PanelLinear(weight, bias, is_output=name == "lm_head")
            elif type(child) is Embedding:
                panels = PanelEmbedding(weight)
            else:
                continue
            setattr(owner, name, panels)


@contextmanager
def one_pool() -> Iterator[None]:
    """Let our threads alone compute: torch's number of them, while torch itself uses one.

    Two pools take the cores from each other, for each spins for a while when its loop is over.
    """
    threads = torch.get_num_threads()
    torch.ops.astrai_panels.use_threads(threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.ops.astrai_panels.use_threads(0)
