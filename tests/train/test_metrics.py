import math

import pytest
import torch

from astrai_train.metrics import Sums, TokenLikelihood


def of_nats(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss without label smoothing."""
    return torch.tensor(value), torch.tensor(value)


def test_sums_are_divided_once_at_the_end():
    """A batch of one bad token and a batch of three good ones: the mean is over four tokens."""
    metric = TokenLikelihood()
    metric.update(*of_nats(8.0), torch.tensor(1), torch.tensor(2))
    metric.update(*of_nats(4.0), torch.tensor(3), torch.tensor(6))
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == pytest.approx(
        {"loss": 3.0, "ppl": math.e**3, "bpb": 12 / math.log(2) / 8}, rel=1e-9
    )


def test_without_bytes_there_are_no_bits_per_byte():
    metric = TokenLikelihood()
    metric.update(*of_nats(8.0), torch.tensor(1), torch.tensor(0))
    assert metric.compute().keys() == {"loss", "ppl"}


def test_a_hundred_million_tokens_add_up():
    metric = TokenLikelihood()
    metric.update(*of_nats(3e8), torch.tensor(100_000_000), torch.tensor(0))
    for _ in range(10):
        metric.update(*of_nats(3.0), torch.tensor(1), torch.tensor(0))
    assert metric.nats.item() == 300_000_030


def test_the_state_stays_out_of_checkpoints():
    assert TokenLikelihood().state_dict() == {}


def test_smoothed_losses_leave_what_follows_from_the_likelihood():
    metric = TokenLikelihood()
    metric.update(torch.tensor(9.0), torch.tensor(6.0), torch.tensor(3), torch.tensor(4))
    values = {name: value.item() for name, value in metric.compute().items()}
    wanted = {"loss": 3.0, "nll": 2.0, "ppl": math.e**2, "bpb": 6 / math.log(2) / 4}
    assert values == pytest.approx(wanted, rel=1e-9)


def test_sums_go_on_from_what_was_saved():
    sums = Sums()
    sums.add("reward", torch.tensor(3.0, requires_grad=True), 2)
    others = Sums(sums.state())
    others.add("reward", 1.5, torch.tensor(1))
    sums.merge(others)
    assert sums.values["reward"].tolist() == [7.5, 5.0]
    assert sums.values["reward"].dtype == torch.float64
