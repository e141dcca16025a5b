import torch

from astrai_core.model.layers import INIT_STD, Embedding, Linear, RMSNorm


def test_a_norm_is_what_its_formula_says():
    norm, x = RMSNorm(6, 1e-3), torch.randn(4, 6)
    norm.weight.data = torch.rand(6)
    by_hand = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), by_hand)


def test_linear_and_embedding_agree_with_torch():
    linear, embedding = Linear(5, 3, bias=True), Embedding(7, 5)
    theirs = torch.nn.Linear(5, 3)
    theirs.load_state_dict(linear.state_dict())
    ids = torch.tensor([[0, 6], [2, 2]])
    x = embedding(ids)
    assert torch.equal(x, embedding.weight[ids])
    torch.testing.assert_close(linear(x), theirs(x))


def test_weights_start_small_and_biases_at_zero():
    linear = Linear(200, 300, bias=True)
    assert abs(linear.weight.std().item() / INIT_STD - 1) < 0.05
    assert linear.bias is not None
    assert not linear.bias.any()
    assert Linear(2, 2).bias is None
