"""Products in panels, against float64."""

import pytest
import torch

from astrai_core.model.layers import Embedding, Linear
from astrai_core.model.panels import PanelEmbedding, PanelLinear, one_pool, panel_, why_no_panels

pytestmark = pytest.mark.skipif(why_no_panels() is not None, reason=str(why_no_panels()))


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16()


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 13, 32])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 2), (64, 8), (70, 6), (200, 514)])
def test_products_are_those_of_float64_but_for_float32_sums(rows, outputs, inputs):
    x, weight = draw(rows, inputs), draw(outputs, inputs)
    exact = x.double() @ weight.double().t()
    # the error of a sum in float32 is in proportion to the sum of its terms' sizes
    bound = x.double().abs() @ weight.double().abs().t() * inputs * 2.0**-24
    wide = PanelLinear(weight, is_output=True)(x)
    assert wide.dtype is torch.float32
    assert bool(((wide - exact).abs() <= bound + 1e-12).all())
    assert torch.equal(PanelLinear(weight)(x), wide.bfloat16())


def test_a_row_does_not_depend_on_the_others_nor_on_threads():
    x, layer = draw(32, 514), PanelLinear(draw(700, 514), draw(700))
    together = layer(x)
    assert torch.equal(torch.cat([layer(x[n : n + 1]) for n in range(32)]), together)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_pool():
            assert torch.get_num_threads() == 1
            assert torch.equal(layer(x), together)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_bias_is_added():
    x, weight, bias = draw(3, 8), draw(5, 8), draw(5)
    assert torch.equal(PanelLinear(weight, bias)(x), PanelLinear(weight)(x) + bias)


def test_an_embedding_gives_back_its_rows():
    weight = draw(130, 6)
    layer = PanelEmbedding(weight)
    ids = torch.tensor([[0, 63, 64], [129, 5, 0]])
    assert torch.equal(layer(ids), weight[ids])
    assert layer.project(draw(2, 6)).shape == (2, 130)


def test_what_is_no_number_stays_none():
    x, layer = draw(7, 8), PanelLinear(draw(70, 8))
    x[3, 2] = torch.nan
    out = layer(x)
    assert bool(out[3].isnan().all())
    assert not bool(out[[0, 1, 2, 4, 5, 6]].isnan().any())


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.astrai_panels.linear(draw(2, 6), PanelLinear(draw(5, 8)).panels, 5, False)
    with pytest.raises(RuntimeError, match="K even"):
        torch.ops.astrai_panels.pack(draw(5, 7))


def test_layers_of_other_types_and_odd_widths_stay():
    model = torch.nn.ModuleDict(
        {
            "first": Linear(8, 5).bfloat16(),
            "odd": Linear(7, 5).bfloat16(),
            "float32": Linear(8, 5),
            "embedding": Embedding(9, 8).bfloat16(),
        }
    )
    panel_(model)
    assert [type(layer) for layer in model.values()] == [
        PanelLinear,
        Linear,
        Linear,
        PanelEmbedding,
    ]
