"""The policy as an engine runs it fastest: fused, and in the type that training multiplies in.

Under autocast an engine that read the trained tensors themselves would round all weights anew in
each of its steps. The copy holds them rounded. Where training does not round, the copy shares the
tensors with the policy, but for those that fusing joins.

What a reader would get wrong: an engine keeps the tensors that it was made with, so that new
weights are written into them.
"""

import copy

import torch
from torch import Tensor, nn

from astrai_core.model import Transformer
from astrai_core.model.fusion import fuse_
from astrai_core.model.lora import lora_layers, merge_lora
from astrai_core.model.moe import Router


class PolicyCopy:
    """A model for an engine, whose weights follow a policy that is trained.

    Args:
        policy: what is trained; adapters are merged in the copy.
    """

    def __init__(self, policy: Transformer) -> None:
        self.model = _inference_copy(policy)

    @torch.no_grad()
    def follow(self, policy: Transformer) -> None:
        """Take over the policy's weights as they are now."""
        now = _tensors(_inference_copy(policy))
        for name, tensor in _tensors(self.model).items():
            if tensor.data_ptr() != now[name].data_ptr():
                tensor.copy_(now[name])


@torch.no_grad()
def _inference_copy(policy: Transformer) -> Transformer:
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
    return fuse_(copy.deepcopy(policy, known).eval())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
