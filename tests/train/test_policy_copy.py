import pytest
import torch

from astrai_core.model import ModelConfig, Transformer
from astrai_core.model.lora import LoRAConfig, add_lora
from astrai_core.model.panels import PanelLinear, why_no_panels
from astrai_core.model.quantization import scheme_of
from astrai_train.policy_copy import PolicyCopy

SHAPE = ModelConfig(vocab_size=50, dim=32, n_layers=2, dim_ffn=48, n_heads=4, n_kv_heads=2)
IDS = torch.arange(12)[None]


def make(*, with_adapters: bool) -> Transformer:
    torch.manual_seed(0)
    policy = Transformer(SHAPE)
    if with_adapters:
        add_lora(policy, LoRAConfig(rank=2))
    change(policy)
    return policy


@torch.no_grad()
def change(policy: Transformer) -> None:
    for parameter in policy.parameters():
        parameter += 0.05 * torch.randn_like(parameter)


@torch.no_grad()
def logits(model: Transformer) -> torch.Tensor:
    return model(IDS)["logits"].float()


@pytest.mark.parametrize("with_adapters", [False, True])
def test_the_copy_follows_in_the_tensors_that_an_engine_holds(with_adapters):
    policy = make(with_adapters=with_adapters)
    follower = PolicyCopy(policy)
    held = [one.data_ptr() for one in follower.model.parameters()]
    torch.testing.assert_close(logits(follower.model), logits(policy), rtol=1e-4, atol=1e-5)
    before = logits(policy)
    change(policy)
    follower.follow(policy)
    assert (logits(policy) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(follower.model), logits(policy), rtol=1e-4, atol=1e-5)
    assert [one.data_ptr() for one in follower.model.parameters()] == held
    assert not any(one.requires_grad for one in follower.model.parameters())
    assert policy.training


def test_without_rounding_tensors_are_shared_but_for_joined_ones():
    policy = make(with_adapters=False)
    shared = {one.data_ptr() for one in policy.parameters()}
    own = {n for n, p in PolicyCopy(policy).model.named_parameters() if p.data_ptr() not in shared}
    assert {name.split(".")[-2] for name in own} == {"qkv_proj", "gate_up_proj"}


def test_under_autocast_it_is_rounded_once():
    policy = make(with_adapters=False)
    with torch.autocast("cpu", torch.bfloat16):
        copied = PolicyCopy(policy).model
    assert {one.dtype for one in copied.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in policy.parameters()} == {torch.float32}
    exact = logits(policy)
    assert 0 < (logits(copied) - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.skipif(why_no_panels() is not None, reason=str(why_no_panels()))
@pytest.mark.parametrize("with_adapters", [False, True])
def test_panels_follow_in_the_tensors_that_an_engine_holds(with_adapters):
    policy = make(with_adapters=with_adapters)
    with torch.autocast("cpu", torch.bfloat16):
        follower = PolicyCopy(policy)
    panels = [m for m in follower.model.modules() if isinstance(m, PanelLinear)]
    assert len(panels) == 4 * SHAPE.n_layers + 1
    held = [layer.panels.data_ptr() for layer in panels]
    before = logits(follower.model)
    change(policy)
    with torch.autocast("cpu", torch.bfloat16):
        follower.follow(policy)
    after = logits(follower.model)
    assert (after - before).abs().max() > 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, logits(PolicyCopy(policy).model))
    exact = logits(policy)
    # adapters make larger numbers to be rounded; without panels the error is the same
    assert 0 < (after - exact).norm() < 0.05 * exact.norm()
    assert [layer.panels.data_ptr() for layer in panels] == held
    before_running = torch.get_num_threads()
    with follower.running():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before_running


def test_a_copy_in_bytes_is_rounded_anew_with_each_update():
    policy = make(with_adapters=False)
    follower = PolicyCopy(policy, "w8a8")
    assert scheme_of(follower.model) == "w8a8"
    held = [one.data_ptr() for one in follower.model.buffers()]
    before = logits(policy)
    change(policy)
    follower.follow(policy)
    exact = logits(policy)
    assert (exact - before).abs().max() > 0.1
    assert 0 < (logits(follower.model) - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.equal(logits(follower.model), logits(PolicyCopy(policy, "w8a8").model))
    assert [one.data_ptr() for one in follower.model.buffers()] == held
