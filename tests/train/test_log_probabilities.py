import pytest
import torch
import torch.nn.functional as F

from astrai_train.losses import token_logprobs


def inputs(length=1100, dim=8, vocab=17):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(length, dim, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, dim, generator=generator, requires_grad=True)
    labels = torch.randint(vocab, (length,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_log_softmax(temperature):
    """1,100 positions cross the edge between two chunks twice."""
    hidden, weight, labels = inputs()
    factors = torch.linspace(-1, 2, len(labels))
    ours = token_logprobs(hidden, weight, labels, temperature)
    (ours * factors).sum().backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None

    table = F.log_softmax(hidden @ weight.T / temperature, dim=-1)
    plain = table.gather(1, labels.clamp(min=0)[:, None]).squeeze(1) * (labels >= 0)
    (plain * factors).sum().backward()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients, (hidden.grad, weight.grad), rtol=1e-5, atol=1e-5)


def test_the_shape_is_that_of_the_labels():
    hidden, weight, labels = inputs(12)
    logprobs = token_logprobs(hidden.view(3, 4, -1), weight, labels.view(3, 4))
    assert logprobs.shape == (3, 4)
    assert torch.equal(logprobs == 0, labels.view(3, 4) == -100)


def test_nothing_to_score_gives_zero_and_zero_gradients():
    hidden, weight, labels = inputs(6)
    token_logprobs(hidden, weight, torch.full_like(labels, -100)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_frozen_output_layer_gets_no_gradient():
    hidden, weight, labels = inputs(6)
    token_logprobs(hidden, weight.detach(), labels).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.any()


def test_bfloat16_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    hidden, weight, labels = inputs(40)
    exact = token_logprobs(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = token_logprobs(hidden, weight, labels)
        rounded.sum().backward()
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
