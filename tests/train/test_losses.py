import pytest
import torch
import torch.nn.functional as F

from astrai_train.losses import IGNORED, cross_entropy, smoothed_cross_entropy


def make(num_positions: int, masked: float):
    torch.manual_seed(0)
    hidden = torch.randn(2, num_positions, 16, requires_grad=True)
    weight = torch.randn(40, 16, requires_grad=True)
    labels = torch.randint(40, (2, num_positions))
    labels[torch.rand(labels.shape) < masked] = IGNORED
    return hidden, weight, labels


@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_sum_and_gradients_are_those_of_the_plain_formula(masked):
    """700 positions a row, so that the last of three chunks is a short one."""
    hidden, weight, labels = make(700, masked)
    total, count = cross_entropy(hidden, weight, labels)
    gradients = torch.autograd.grad(total * 0.25, (hidden, weight))
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    wanted = torch.autograd.grad(plain * 0.25, (hidden, weight))
    assert count == (labels >= 0).sum()
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


def test_without_a_trained_position_everything_is_zero():
    hidden, weight, labels = make(5, 1.1)
    total, count = cross_entropy(hidden, weight, labels)
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert (total.item(), count.item()) == (0, 0)
    assert all((gradient == 0).all() for gradient in gradients)


def test_masked_positions_are_never_projected():
    """Infinite hidden states at masked positions would make any projection of them NaN."""
    hidden, weight, labels = make(5, 0)
    labels[:, 2] = IGNORED
    spoilt = hidden.detach().clone()
    spoilt[:, 2] = torch.inf
    assert cross_entropy(spoilt, weight, labels)[0].isfinite()


def test_half_precision_states_are_summed_in_float32():
    hidden, weight, labels = make(300, 0)
    total, _ = cross_entropy(hidden.bfloat16(), weight, labels)
    wanted, _ = cross_entropy(hidden.bfloat16().float(), weight, labels)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.6])
def test_smoothed_targets_are_those_of_torch(smoothing):
    hidden, weight, labels = make(700, 0.4)
    total, nats, count = smoothed_cross_entropy(hidden, weight, labels, smoothing)
    gradients = torch.autograd.grad(total, (hidden, weight))
    logits, flat = (hidden @ weight.T).flatten(0, 1), labels.flatten()
    plain = F.cross_entropy(logits, flat, reduction="sum", label_smoothing=smoothing)
    wanted = torch.autograd.grad(plain, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nats, F.cross_entropy(logits, flat, reduction="sum"))
    assert count == (labels >= 0).sum()


def test_smoothing_nothing_is_zero_too():
    hidden, weight, labels = make(5, 1.1)
    total, nats, count = smoothed_cross_entropy(hidden, weight, labels, 0.1)
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert (total.item(), nats.item(), count.item()) == (0, 0, 0)
    assert all((gradient == 0).all() for gradient in gradients)
