"""How far gradients may be from those that are meant: rounding in fp32, and nothing else."""

from collections.abc import Mapping

from torch import Tensor

MOST = 1e-5
"""Norm of the difference, relative to that of the gradient."""


def assert_same_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Compare parameter by parameter: a small one is not hidden by those with large gradients."""
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        difference = (ours[name].double() - wanted.double()).norm().item()
        assert difference <= MOST * wanted.double().norm().item(), (
            f"{name}: {difference:.3g} of {wanted.norm():.3g}"
        )
