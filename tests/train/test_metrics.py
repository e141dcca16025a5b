import math

import pytest
import torch

from astrai_train.metrics import TokenLikelihood


def test_sums_are_divided_once_at_the_end():
    """A batch of one bad token and a batch of three good ones: the mean is over four tokens."""
    metric = TokenLikelihood()
    metric.update(torch.tensor(8.0), torch.tensor(1), torch.tensor(2))
    metric.update(torch.tensor(4.0), torch.tensor(3), torch.tensor(6))
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == pytest.approx(
        {"loss": 3.0, "ppl": math.e**3, "bpb": 12 / math.log(2) / 8}, rel=1e-9
    )


def test_without_bytes_there_are_no_bits_per_byte():
    metric = TokenLikelihood()
    metric.update(torch.tensor(8.0), torch.tensor(1), torch.tensor(0))
    assert metric.compute().keys() == {"loss", "ppl"}


def test_a_hundred_million_tokens_add_up():
    metric = TokenLikelihood()
    metric.update(torch.tensor(3e8), torch.tensor(100_000_000), torch.tensor(0))
    for _ in range(10):
        metric.update(torch.tensor(3.0), torch.tensor(1), torch.tensor(0))
    assert metric.nats.item() == 300_000_030


def test_the_state_stays_out_of_checkpoints():
    assert TokenLikelihood().state_dict() == {}
