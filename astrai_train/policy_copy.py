"""The policy as an engine runs it fastest: fused, and in the type that training multiplies in.

Under autocast an engine that read the trained tensors themselves would round all weights anew in
each of its steps. The copy holds them rounded, and in panels where the processor multiplies
bfloat16. Where training does not round, the copy shares the tensors with the policy, but for those
that fusing joins. A copy in w8a8 is rounded anew with each update: a little faster, and another
distribution than the one that is trained.

What a reader would get wrong: an engine keeps the tensors that it was made with, so that new
weights are written into them.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from astrai_core.model import Transformer
from astrai_core.model.fusion import fuse_
from astrai_core.model.lora import lora_layers, merge_lora
from astrai_core.model.moe import Router
from astrai_core.model.packed import PackedLinear
from astrai_core.model.panels import PanelLinear, one_pool, panel_, why_no_panels
from astrai_core.model.quantization import quantize_

Rounding = Literal["w8a8"]
"""How a copy's weights are rounded beyond the type that training multiplies in."""


class PolicyCopy:
    """A model for an engine, whose weights follow a policy that is trained.

    Args:
        policy: what is trained; adapters are merged in the copy.
        rounding: of its matrices; None leaves them as training has them.
    """

    def __init__(self, policy: Transformer, rounding: Rounding | None = None) -> None:
        self._rounding: Rounding | None = rounding
        self.model = _inference_copy(policy, rounding)
        ours = any(isinstance(m, PanelLinear | PackedLinear) for m in self.model.modules())
        self._is_ours = ours and _is_plain(self.model) and why_no_panels() is None

    def running(self) -> AbstractContextManager[None]:
        """What an engine over the copy runs in: one pool of threads, if its products are ours."""
        return one_pool() if self._is_ours else nullcontext()

    @torch.no_grad()
    def follow(self, policy: Transformer) -> None:
        """Take over the policy's weights as they are now."""
        now = _tensors(_inference_copy(policy, self._rounding))
        for name, tensor in _tensors(self.model).items():
            if tensor.data_ptr() != now[name].data_ptr():
                tensor.copy_(now[name])


@torch.no_grad()
def _inference_copy(policy: Transformer, rounding: Rounding | None) -> Transformer:
    device = policy.device.type
    dtype = policy.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if lora_layers(policy):
        # adapters are added to their matrices before anything is rounded
        policy = copy.deepcopy(policy)
        merge_lora(policy)
    exact = {id(m.weight) for m in policy.modules() if isinstance(m, Router)}
    known: dict[int, object] = {
        id(one): nn.Parameter(
            one.detach() if id(one) in exact else one.detach().to(dtype), requires_grad=False
        )
        for one in policy.parameters()
    }
    model = copy.deepcopy(policy, known).eval()
    if rounding is not None:
        quantize_(model, rounding)
    fuse_(model)
    if dtype is torch.bfloat16 and device == "cpu" and _is_plain(model) and why_no_panels() is None:
        panel_(model)
    return model


def _is_plain(model: Transformer) -> bool:
    """Whether every product is a layer's: latent attention and experts have others too."""
    return model.config.attn_type == "gqa" and model.config.ffn_type == "mlp"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
