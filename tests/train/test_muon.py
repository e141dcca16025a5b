import copy

import pytest
import torch
from torch import nn

from astrai_train.muon import Muon, orthogonalised


def group(parameters, orthogonal, lr=0.02, weight_decay=0.1):
    return {
        "params": parameters,
        "lr": lr,
        "weight_decay": weight_decay,
        "orthogonal": orthogonal,
    }


def weights(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step_with(optimizer, parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (48, 16), (16, 48)])
def test_singular_values_become_about_one(rows, columns):
    left, _ = torch.linalg.qr(torch.randn(3, rows, 16))
    right, _ = torch.linalg.qr(torch.randn(3, columns, 16))
    matrices = left * torch.linspace(0.1, 5, 16) @ right.mT
    singular = torch.linalg.svdvals(orthogonalised(matrices))
    assert 0.6 < singular.min() <= singular.max() < 1.3


def test_matrices_move_as_under_torchs_muon():
    """PyTorch's own iterates in bfloat16, one matrix at a time."""
    ours, theirs = (weights((12, 12), (32, 12), (12, 32), (12, 12)) for _ in range(2))
    optimizer = Muon([group(ours, True)])
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for seed in range(4):
        step_with(optimizer, ours, seed)
        step_with(reference, theirs, seed)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


def test_the_rest_moves_as_under_adamw():
    ours, theirs = weights((12,), (9, 4)), weights((12,), (9, 4))
    optimizer = Muon([group(ours, False, lr=0.01)], betas=(0.8, 0.9))
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), fused=True)
    for seed in range(4):
        step_with(optimizer, ours, seed)
        step_with(reference, theirs, seed)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_saved_state_goes_on_bit_by_bit():
    parameters = weights((8, 8), (8,))
    optimizer = Muon([group(parameters[:1], True), group(parameters[1:], False)])
    step_with(optimizer, parameters, 0)
    copied = copy.deepcopy(parameters)
    resumed = Muon([group(copied[:1], True), group(copied[1:], False)])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, ones in ((optimizer, parameters), (resumed, copied)):
        step_with(one, ones, 1)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copied, strict=True))
    assert not torch.equal(parameters[0], weights((8, 8))[0])


def test_a_parameter_without_a_gradient_stays():
    still, moved = weights((4, 4), (4, 4))
    before = still.detach().clone()
    moved.grad = torch.randn(4, 4)
    Muon([group([still, moved], True)]).step()
    assert torch.equal(still.detach(), before)
