"""Packed W8A8 layers: whole numbers against 64-bit arithmetic, and rows that stand alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from astrai_core.model import packed
from astrai_core.model.packed import PackedEmbedding, PackedLinear
from astrai_core.model.quantization import QuantisedEmbedding, W8A8Linear
from astrai_core.model.quantization.rounding import quantize_rows

WHY_NOT = packed.why_not_packed()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.usefixtures("packed_threads"),
]
SHAPES = [(1, 1), (64, 64), (70, 33), (200, 329)]  # outputs, inputs


def layer_of(outputs, inputs):
    torch.manual_seed(outputs)
    weight, scale = quantize_rows(torch.randn(outputs, inputs))
    return weight, scale[:, 0].contiguous()


@pytest.mark.parametrize("sizes", [(64, 64), (48, 16, 16), (5, 70, 1), (130,)])
def test_matrices_are_packed_as_if_they_were_one(sizes):
    weights = [torch.randint(-127, 128, (size, 77), dtype=torch.int8) for size in sizes]
    several = torch.ops.astrai_packed.pack(weights)
    assert torch.equal(several, torch.ops.astrai_packed.pack([torch.cat(weights)]))


def test_matrices_that_do_not_fit_together_are_refused():
    weights = [torch.zeros(2, width, dtype=torch.int8) for width in (3, 4)]
    with pytest.raises(RuntimeError, match="of one K"):
        torch.ops.astrai_packed.pack(weights)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_are_exact(outputs, inputs):
    weight, _ = layer_of(outputs, inputs)
    x = torch.randint(-127, 128, (29, inputs))
    x[:, 0] = 127  # the largest of a row is what it is rounded by
    layer = PackedLinear(weight, torch.ones(outputs))
    for rows in (1, 2, 5, 6, 7, 29):
        assert torch.equal(layer(x[:rows].float()).long(), x[:rows] @ weight.long().t())


def test_more_rows_than_stay_in_the_cache():
    weight, _ = layer_of(130, 1800)
    x = torch.randint(-127, 128, (601, 1800))
    x[:, 0] = 127
    layer = PackedLinear(weight, torch.ones(130))
    assert torch.equal(layer(x.float()).long(), x @ weight.long().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_row_has_the_same_bits_alone(outputs, inputs, dtype):
    layer, x = PackedLinear(*layer_of(outputs, inputs)), torch.randn(29, inputs).to(dtype)
    together = layer(x)
    assert together.dtype == dtype
    assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))


def test_rows_are_rounded_as_a_division_rounds():
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(4000, 1, generator=generator).mul(20).sub(10).exp()
    halves = (torch.randint(-127, 127, (4000, 64), generator=generator) + 0.5) * scale
    beside = torch.nextafter(halves, torch.full_like(halves, torch.inf))
    layer = PackedLinear(torch.eye(64, dtype=torch.int8), torch.ones(64))
    for x in (halves, beside, torch.randn(4000, 64, generator=generator) * scale):
        scale = x.abs().amax(1, keepdim=True) / 127
        assert torch.equal((layer(x) / scale).round(), (x / scale).round())


def test_a_number_that_is_none_is_not_lost():
    layer = PackedLinear(*layer_of(70, 33))
    x = torch.randn(8, 33)
    x[3, 5] = torch.nan
    assert layer(x).isnan().any(1).tolist() == [n == 3 for n in range(8)]


def test_it_is_the_layer_it_was_packed_from():
    weight, scale = layer_of(200, 329)
    bias, x = torch.randn(200), torch.randn(2, 5, 329)
    torch.testing.assert_close(
        PackedLinear(weight, scale, bias)(x), W8A8Linear(weight, scale, bias)(x)
    )


def test_an_embedding_looks_up_what_it_multiplies_by():
    weight, scale = layer_of(200, 33)
    plain, mine = (
        QuantisedEmbedding(weight, scale, rounds_inputs=True),
        PackedEmbedding(weight, scale),
    )
    ids, x = torch.randint(0, 200, (3, 7)), torch.randn(4, 33, dtype=torch.bfloat16)
    assert torch.equal(mine(ids), plain(ids))
    assert mine.project(x).dtype == torch.float32
    torch.testing.assert_close(mine.project(x), plain.project(x.float()))
    with pytest.raises(RuntimeError, match="vocabulary"):
        mine(torch.tensor([200]))


def test_two_callers_at_once_share_the_team():
    layer, x = PackedLinear(*layer_of(640, 512)), torch.randn(64, 512)
    wanted = layer(x)
    with ThreadPoolExecutor(2) as callers:
        is_equal = callers.map(lambda _: torch.equal(layer(x), wanted), range(400))
    assert all(is_equal)
