"""A row's result is the same to the last bit, alone or among others, and the right one."""

import pytest
import torch

from astrai_core.model import ModelConfig
from astrai_core.model.moe import Router
from astrai_core.model.rowwise import (
    RowwiseRouter,
    product,
    product_of_heads,
    why_not_rowwise,
)

pytestmark = pytest.mark.skipif(why_not_rowwise() is not None, reason=str(why_not_rowwise()))


def rows_of(kind, count, width):
    generator = torch.Generator().manual_seed(count + width)
    x = torch.randn(count, width, generator=generator)
    if kind == "cancelling":  # sums of large numbers of which little is left
        x[:, 1::2] = -x[:, : width // 2 * 2 : 2] * (1 + 1e-6 * x[:, 1::2])
        x *= 10.0 ** torch.randint(-6, 7, (count, 1), generator=generator)
    if kind == "wide":  # every order of summation rounds otherwise
        x *= 10.0 ** torch.randint(-12, 13, (count, width), generator=generator)
    return x


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["random", "cancelling", "wide"])
@pytest.mark.parametrize("shape", [(67, 48), (8, 200), (130, 33), (33, 7), (64, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_depends_on_its_row_alone(threads, kind, shape, dtype):
    x, weight = rows_of(kind, 70, shape[1]), rows_of(kind, *shape).to(dtype)
    alone = torch.cat([product(x[n : n + 1], weight) for n in range(70)])
    for count in range(1, 71):
        assert torch.equal(product(x[:count], weight), alone[:count])
    for first in range(1, 50):  # each place in a block
        assert torch.equal(product(x[first:], weight), alone[first:])


@pytest.mark.parametrize("shape", [(67, 48), (130, 33), (33, 7)], ids=str)
def test_a_product_is_right(shape):
    x, weight = rows_of("random", 53, shape[1]), rows_of("random", *shape)
    wanted = x.double() @ weight.double().t()
    torch.testing.assert_close(product(x, weight).double(), wanted, rtol=1e-5, atol=1e-5)
    rounded = weight.bfloat16()
    wanted = x.double() @ rounded.double().t()
    torch.testing.assert_close(product(x, rounded).double(), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_no_number_stays_in_its_row():
    x, weight = rows_of("random", 20, 40), rows_of("random", 9, 40)
    wanted = product(x, weight)
    x[7, 3], x[11, 39] = torch.nan, torch.inf
    out = product(x, weight)
    is_other = torch.ones(20, dtype=torch.bool)
    is_other[[7, 11]] = False
    assert not out[~is_other].isfinite().any()
    assert torch.equal(out[is_other], wanted[is_other])


@pytest.mark.parametrize("kind", ["random", "cancelling", "wide"])
def test_heads_depend_on_their_row_alone(threads, kind):
    x = rows_of(kind, 70, 5 * 24).view(70, 5, 24)
    weight = rows_of(kind, 5 * 36, 24).view(5, 36, 24)
    alone = torch.cat([product_of_heads(x[n : n + 1], weight) for n in range(70)])
    for count in range(1, 71):
        assert torch.equal(product_of_heads(x[:count], weight), alone[:count])
        assert torch.equal(product_of_heads(x[-count:], weight), alone[-count:])
    if kind == "random":
        wanted = torch.einsum("nhi,hoi->nho", x.double(), weight.double())
        torch.testing.assert_close(alone.double(), wanted, rtol=1e-5, atol=1e-5)


ROUTERS = {
    "softmax": {},
    "normed": {"norm_topk_prob": True},
    "groups": {
        "moe_topk_method": "group_limited_greedy",
        "n_expert_groups": 4,
        "n_activated_groups": 2,
    },
    "sigmoid with a bias": {
        "moe_scoring": "sigmoid",
        "moe_topk_method": "noaux_tc",
        "n_expert_groups": 4,
        "n_activated_groups": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}


@pytest.mark.parametrize("fields", ROUTERS.values(), ids=list(ROUTERS))
@pytest.mark.parametrize("kind", ["random", "wide"])
def test_a_router_decides_by_a_row_alone_and_as_the_other_does(threads, fields, kind):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=8, dim=48, n_layers=1, dim_ffn=8, n_heads=2, max_len=8, ffn_type="moe",
        n_routed_experts=12, n_activated_experts=3, dim_ffn_expert=8, **fields,
    )  # fmt: skip
    plain = Router(config)
    plain.weight.data *= 20
    if plain.e_score_correction_bias is not None:
        plain.e_score_correction_bias.uniform_(-0.1, 0.1)
    router, x = RowwiseRouter(plain), rows_of(kind, 70, 48)
    with torch.inference_mode():
        alone = [router(x[n : n + 1]) for n in range(70)]
        for count in range(1, 71):
            together = router(x[:count])
            for n in range(count):
                assert torch.equal(together.scores[n], alone[n].scores[0])
                assert torch.equal(together.experts[n], alone[n].experts[0])
                assert torch.equal(together.weights[n], alone[n].weights[0])
        if kind == "random":
            wanted, got = plain(x), router(x)
            torch.testing.assert_close(got.scores, wanted.scores)
            assert torch.equal(got.experts, wanted.experts)
            torch.testing.assert_close(got.weights, wanted.weights)
