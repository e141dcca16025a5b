"""The mixtures of experts of transformers' families, block against block."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from astrai_core.model import ModelConfig
from astrai_core.model.moe import DeepSeekMoE

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

DIM, EXPERTS = 24, 8
SHAPE = {
    "hidden_size": DIM, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 1,
    "moe_intermediate_size": 20, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "n_routed_experts": EXPERTS, "num_experts": EXPERTS,
}  # fmt: skip
OURS: dict[str, Any] = {
    "dim": DIM, "n_heads": 2, "ffn_type": "moe", "dim_ffn_expert": 20, "n_activated_experts": 3,
    "n_routed_experts": EXPERTS,
}  # fmt: skip


def deepseek_v2(groups: int) -> tuple[nn.Module, ModelConfig]:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    method = "group_limited_greedy" if groups > 1 else "greedy"
    config = transformers.DeepseekV2Config(
        **SHAPE, topk_method=method, n_group=groups, topk_group=max(1, groups // 2),
        routed_scaling_factor=2.5,
    )  # fmt: skip
    ours = ModelConfig(
        **OURS, n_shared_experts=2, moe_topk_method=method, n_expert_groups=groups,
        n_activated_groups=max(1, groups // 2), routed_scaling_factor=2.5,
    )  # fmt: skip
    return DeepseekV2Moe(config), ours


def deepseek_v3(groups: int, bias: float, norm: bool) -> tuple[nn.Module, ModelConfig]:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        **SHAPE, n_group=groups, topk_group=max(1, groups // 2), routed_scaling_factor=1.5,
        norm_topk_prob=norm,
    )  # fmt: skip
    ours = ModelConfig(
        **OURS, n_shared_experts=2, moe_topk_method="noaux_tc", moe_scoring="sigmoid",
        n_expert_groups=groups, n_activated_groups=max(1, groups // 2), routed_scaling_factor=1.5,
        norm_topk_prob=norm,
    )  # fmt: skip
    block = DeepseekV3MoE(config)
    torch.manual_seed(1)
    block.gate.e_score_correction_bias.copy_(bias * torch.rand(EXPERTS))
    return block, ours


def qwen3(norm: bool) -> tuple[nn.Module, ModelConfig]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = transformers.Qwen3MoeConfig(**SHAPE, norm_topk_prob=norm)
    return Qwen3MoeSparseMoeBlock(config), ModelConfig(**OURS, norm_topk_prob=norm)


CASES = {
    "deepseek v2": lambda: deepseek_v2(1),
    "deepseek v2 in groups": lambda: deepseek_v2(2),
    "deepseek v2 in four groups": lambda: deepseek_v2(4),
    "deepseek v3": lambda: deepseek_v3(1, 0.0, True),
    "deepseek v3 biased": lambda: deepseek_v3(1, 2.0, True),
    "deepseek v3 biased below zero": lambda: deepseek_v3(2, -2.0, True),
    "deepseek v3 in groups": lambda: deepseek_v3(2, 0.0, True),
    "deepseek v3 in groups, biased": lambda: deepseek_v3(4, 2.0, False),
    "qwen3": lambda: qwen3(False),
    "qwen3 normed": lambda: qwen3(True),
}


def on_disk(block: nn.Module) -> dict[str, Tensor]:
    """Their tensors as files hold them: one matrix for each projection of each expert."""
    state = dict(block.state_dict())
    gate_up, down = state.pop("experts.gate_up_proj"), state.pop("experts.down_proj")
    for n in range(EXPERTS):
        gate, up = gate_up[n].chunk(2)
        state |= {f"experts.{n}.gate_proj.weight": gate, f"experts.{n}.up_proj.weight": up}
        state[f"experts.{n}.down_proj.weight"] = down[n]
    return state


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_equal(case):
    theirs, config = CASES[case]()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = DeepSeekMoE(config)
    ours.load_state_dict(on_disk(theirs))
    x = torch.randn(1, 37, DIM)
    their_x, our_x = x.clone().requires_grad_(), x[0].clone().requires_grad_()
    their_out, our_out = theirs(their_x), ours(our_x)
    torch.testing.assert_close(our_out, their_out[0], atol=1e-5, rtol=1e-5)
    their_out.square().mean().backward()
    our_out.square().mean().backward()
    assert their_x.grad is not None
    torch.testing.assert_close(our_x.grad, their_x.grad[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        ours.gate.weight.grad, theirs.get_parameter("gate.weight").grad, atol=1e-5, rtol=1e-4
    )
    fused = theirs.get_parameter("experts.gate_up_proj").grad
    assert fused is not None
    for n in range(EXPERTS):
        grads = [ours.get_parameter(f"experts.{n}.{p}_proj.weight").grad for p in ("gate", "up")]
        assert all(grad is not None for grad in grads)
        own = torch.cat([grad for grad in grads if grad is not None])
        torch.testing.assert_close(own, fused[n], atol=1e-5, rtol=1e-4)
