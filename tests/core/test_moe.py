from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.model.feed_forward import MLP
from astrai_core.model.layers import Linear
from astrai_core.model.moe import DeepSeekMoE, Router, Routing, grouped_linear
from astrai_core.model.quantization import quantize_

SMALL: dict[str, Any] = {
    "dim": 16,
    "n_heads": 2,
    "ffn_type": "moe",
    "n_routed_experts": 6,
    "n_activated_experts": 2,
    "n_shared_experts": 1,
    "dim_ffn_expert": 12,
}
V3: dict[str, Any] = {"moe_topk_method": "noaux_tc", "moe_scoring": "sigmoid"}


def make(**changes) -> DeepSeekMoE:
    torch.manual_seed(0)
    moe = DeepSeekMoE(ModelConfig(**{**SMALL, **changes}))
    for parameter in moe.parameters():
        parameter.data.normal_(std=0.4)
    return moe


def expert_of(moe: DeepSeekMoE, number: int) -> MLP:
    expert = moe.experts[number]
    assert isinstance(expert, MLP)
    return expert


def by_hand(moe: DeepSeekMoE, token: Tensor) -> Tensor:
    """One token alone, its experts one after the other."""
    scores = (moe.gate.weight @ token).softmax(0)
    best = sorted(range(6), key=lambda n: -scores[n].item())[:2]
    out = sum(scores[n] * expert_of(moe, n)(token[None])[0] for n in best)
    assert isinstance(out, Tensor)
    return out if moe.shared_experts is None else out + moe.shared_experts(token[None])[0]


@pytest.mark.parametrize("shared", [0, 1, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 31])
def test_each_token_gets_its_experts(shared, num_tokens):
    moe, x = make(n_shared_experts=shared), torch.randn(num_tokens, 16)
    expected = torch.stack([by_hand(moe, token) for token in x])
    torch.testing.assert_close(moe(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(moe(x), expected)


def test_gradients_are_those_of_tokens_alone():
    moe, x = make(), torch.randn(9, 16)
    moe(x).square().mean().backward()
    grads = [p.grad.clone() if p.grad is not None else None for p in moe.parameters()]
    moe.zero_grad()
    torch.stack([by_hand(moe, token) for token in x]).square().mean().backward()
    for ours, parameter in zip(grads, moe.parameters(), strict=True):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(ours, expected)  # an expert without tokens has zeros, not None


def test_grouped_products_have_the_right_gradients():
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ends = torch.tensor([2, 2, 5])  # the second expert has no rows

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return grouped_linear(x, ends, list(weights))

    assert torch.autograd.gradcheck(function, (x, *weights))


def test_weights_are_of_scores_without_the_bias():
    router = Router(ModelConfig(**SMALL, **V3, norm_topk_prob=True, routed_scaling_factor=2.0))
    bias = router.e_score_correction_bias
    assert bias is not None
    bias.copy_(torch.tensor([0, 0, 9, 0, 9, 0]))
    x = torch.randn(7, 16)
    routing = router(x)
    assert all(sorted(chosen) == [2, 4] for chosen in routing.experts.tolist())
    scores = (x @ router.weight.t()).sigmoid().gather(1, routing.experts)
    torch.testing.assert_close(routing.weights, 2 * scores / scores.sum(1, keepdim=True))


def test_a_group_counts_by_its_two_best():
    """The best expert's group loses to one with two good ones."""
    config = ModelConfig(**SMALL, **V3, n_expert_groups=3, n_activated_groups=1)
    router = Router(config)
    with torch.no_grad():
        router.weight.zero_()  # all scores are 0.5
    bias = router.e_score_correction_bias
    assert bias is not None
    bias.copy_(torch.tensor([0.9, -3, 0.4, 0.6, -9, -9]))
    assert sorted(router(torch.randn(1, 16)).experts[0].tolist()) == [2, 3]


def test_groups_whose_scores_are_below_zero_stay_ahead_of_those_left_out():
    config = ModelConfig(**SMALL, **V3, n_expert_groups=3, n_activated_groups=1)
    router = Router(config)
    bias = router.e_score_correction_bias
    assert bias is not None
    bias.copy_(torch.tensor([-5, -5, -4, -4, -6, -6]))
    assert sorted(router(torch.randn(1, 16)).experts[0].tolist()) == [2, 3]


def test_the_router_tells_what_it_decided():
    moe, routings = make(), list[Routing]()
    moe(torch.randn(5, 16), routings)
    assert routings[0].experts.shape == routings[0].weights.shape == (5, 2)
    torch.testing.assert_close(routings[0].scores.sum(1), torch.ones(5))


def test_the_bias_stays_in_float32():
    model = Transformer(ModelConfig(vocab_size=9, n_layers=1, **SMALL, **V3))
    name = "layers.0.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).fill_(1.001)
    model = model.to(torch.bfloat16)
    assert model.get_buffer(name).dtype == torch.float32
    torch.testing.assert_close(model.get_buffer(name), torch.full((6,), 1.001))
    assert model.layers[0].get_parameter("mlp.gate.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_a_folder_keeps_the_bias_in_float32(dtype, tmp_path):
    model = Transformer(ModelConfig(vocab_size=9, n_layers=2, first_k_dense=1, **SMALL, **V3))
    name = "layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).fill_(1.001)
    AutoModel.save_pretrained(model.to(torch.bfloat16), tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype)
    torch.testing.assert_close(loaded.get_buffer(name), torch.full((6,), 1.001))
    assert loaded.embed_tokens.weight.dtype == (dtype or torch.bfloat16)
    assert isinstance(loaded.layers[0].get_submodule("mlp"), MLP)


def test_a_model_on_the_meta_device_is_drawn_anew():
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size=9, n_layers=1, **SMALL, **V3))
    model.to_empty(device="cpu").reset_parameters()
    assert model(torch.zeros(1, 3, dtype=torch.int64))["logits"].isfinite().all()
    assert not model.get_buffer("layers.0.mlp.gate.e_score_correction_bias").any()


class Doubled(nn.Module):
    """An adapter: stands around a layer."""

    def __init__(self, base: Linear):
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def test_layers_of_experts_can_be_replaced():
    moe, x = make(), torch.randn(9, 16)
    expected = make()
    for n in range(6):
        down = expert_of(moe, n).down_proj
        setattr(moe.experts[n], "down_proj", Doubled(down))  # noqa: B010 - another class
        expert_of(expected, n).down_proj.weight.data *= 2
    torch.testing.assert_close(moe(x), expected(x))
    moe(x).sum().backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())


def test_experts_can_be_quantised():
    moe, x = make().eval(), torch.randn(40, 16)
    expected = moe(x)
    quantize_(moe)
    with torch.inference_mode():
        error = F.mse_loss(moe(x), expected).sqrt() / expected.std()
    assert 0 < error < 0.03


def test_compiled_training_equals_eager():
    eager, compiled = make(), make()
    x = torch.randn(21, 16)
    run = torch.compile(lambda x: compiled(x), backend="aot_eager", fullgraph=True)
    for moe, out in ((eager, eager(x)), (compiled, run(x))):
        out.square().mean().backward()
        torch.testing.assert_close(out, eager(x))
        assert moe.gate.weight.grad is not None
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_frozen_experts_cost_no_gradients():
    moe, x = make(), torch.randn(9, 16, requires_grad=True)
    moe(x).square().mean().backward()
    expected, x.grad = x.grad, None
    moe.experts.requires_grad_(False)
    with torch.profiler.profile() as profile:
        moe(x).square().mean().backward()
    assert "astrai::grouped_linear_weights" not in {event.key for event in profile.key_averages()}
    assert all(parameter.grad is not None for parameter in moe.gate.parameters())
    torch.testing.assert_close(x.grad, expected)


def test_autocast_leaves_the_router_alone():
    moe, x = make(), torch.randn(33, 16)
    plain = moe.gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast, out = moe.gate(x), moe(x)
    assert torch.equal(cast.weights, plain.weights)
    torch.testing.assert_close(out, moe(x), atol=0.1, rtol=0.1)
    out.float().sum().backward()
    assert expert_of(moe, 0).up_proj.weight.grad is not None
