"""Packed experts: the layer they are made of, what is read, and rows that stand alone."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from astrai_core.model.fusion import packed_moe, why_not_fused
from astrai_core.model.packed import PackedLinear
from astrai_core.model.packed_experts import PackedMoE, why_not_packed_experts
from astrai_core.model.rowwise import RowwiseMoE

from .noisy_block import noisy_block

WHY_NOT = why_not_fused() or why_not_packed_experts()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.usefixtures("packed_threads"),
]
block_of = functools.partial(
    noisy_block, n_heads=2, ffn_type="moe", n_routed_experts=12, n_activated_experts=3,
    dim_ffn_expert=40,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "normed, shared": {"norm_topk_prob": True, "n_shared_experts": 2},
    "groups": {
        "moe_topk_method": "group_limited_greedy", "n_expert_groups": 4, "n_activated_groups": 2,
        "n_shared_experts": 1,
    },
    "sigmoid with a bias, groups": {
        "moe_scoring": "sigmoid", "moe_topk_method": "noaux_tc", "n_expert_groups": 4,
        "n_activated_groups": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    "sigmoid with a bias": {"moe_scoring": "sigmoid", "moe_topk_method": "noaux_tc"},
}  # fmt: skip


def feed_of(block):
    """The block's stream plus its experts, and the packed experts."""
    block.pack_()
    experts, norm = block.mlp, block.post_attention_layernorm
    assert isinstance(experts, PackedMoE)
    return experts.function(norm.weight, norm.norm_eps), experts


def rows_of(count, dtype=torch.float32):
    return torch.randn(count, 96, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("changes", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize(
    ("count", "dtype"), [*((n, torch.float32) for n in (1, 2, 7, 70)), (70, torch.bfloat16)]
)
def test_they_are_the_layer_they_were_made_of(changes, dtype, count):
    block, x = block_of(dtype, **changes), rows_of(count, dtype)
    assert isinstance(block.mlp, RowwiseMoE)
    theirs, ours = [], []
    wanted = block.mlp(block.post_attention_layernorm(x), theirs)
    feed, _ = feed_of(block)
    got = feed(x, ours)
    assert got.dtype == dtype
    torch.testing.assert_close(
        ours[0].scores, theirs[0].scores, atol=1e-6 if dtype == torch.float32 else 0.02, rtol=1e-5
    )
    # bfloat16 rounds what the other router sees, which may choose another expert
    is_same = (ours[0].experts == theirs[0].experts).all(1)
    assert is_same.float().mean() > (0.999 if dtype == torch.float32 else 0.7)
    if dtype == torch.float32:
        torch.testing.assert_close(ours[0].weights, theirs[0].weights)
    close = 0.01 if dtype == torch.float32 else 0.04
    difference = (got.float() - x.float() - wanted.float())[is_same].abs().max()
    assert difference < close * wanted.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", KINDS.values(), ids=list(KINDS))
def test_a_row_has_the_same_bits_alone(changes, dtype):
    (feed, _), x = feed_of(block_of(dtype, **changes)), rows_of(61, dtype)
    chosen = []
    alone = torch.cat([feed(row[None], chosen) for row in x])
    for count in (2, 3, 5, 6, 7, 13, 48, 61):
        together = []
        assert torch.equal(feed(x[:count], together), alone[:count])
        assert torch.equal(feed(x[-count:], None), alone[-count:])
        for name in ("scores", "experts", "weights"):
            got, one_by_one = getattr(together[0], name), [getattr(r, name) for r in chosen]
            assert torch.equal(got, torch.cat(one_by_one[:count]))


def test_what_no_row_chose_is_not_read():
    (feed, experts), x = feed_of(block_of(n_shared_experts=1)), rows_of(2)
    routings = []
    wanted = feed(x, routings)
    is_chosen = torch.zeros(12, dtype=torch.bool)
    is_chosen[routings[0].experts.flatten()] = True
    assert 3 <= is_chosen.sum() < 12
    experts.gate_up_scale[~is_chosen] = torch.nan
    experts.down_scale[~is_chosen] = torch.nan
    assert torch.equal(feed(x, None), wanted)
    experts.down_scale[is_chosen] = torch.nan
    assert feed(x, None).isnan().all()


def test_of_equal_scores_the_first_win():
    (feed, experts), routings = feed_of(block_of()), []
    experts.router.zero_()
    feed(rows_of(4), routings)
    assert routings[0].experts.tolist() == [[0, 1, 2]] * 4


@pytest.mark.parametrize("changes", KINDS.values(), ids=list(KINDS))
def test_what_is_no_number_stays_in_its_row(changes):
    (feed, _), x = feed_of(block_of(**changes)), rows_of(9)
    wanted = feed(x, None)
    x[4, 3], x[7, 5] = torch.nan, torch.inf
    out = feed(x, None)
    is_other = torch.ones(9, dtype=torch.bool)
    is_other[[4, 7]] = False
    assert out[~is_other].isnan().all()
    assert torch.equal(out[is_other], wanted[is_other])


def test_no_rows_are_no_rows():
    feed, _ = feed_of(block_of(n_shared_experts=1))
    assert feed(rows_of(0), None).shape == (0, 96)


def test_experts_with_biases_stay_with_single_operators():
    block = block_of()
    experts = block.mlp
    assert isinstance(experts, RowwiseMoE)
    layer = experts.experts[5].down_proj
    layer.bias = torch.ones(96)  # pyright: ignore[reportAttributeAccessIssue]
    block.pack_()
    assert isinstance(block.mlp, RowwiseMoE)
    assert isinstance(block.mlp.experts[5].down_proj, PackedLinear)
    assert packed_moe(block.mlp) is None


def test_two_callers_at_once_share_the_team():
    (feed, _), x = feed_of(block_of(n_shared_experts=1)), rows_of(40)
    wanted = feed(x, None)
    with ThreadPoolExecutor(2) as callers:
        is_equal = callers.map(lambda _: torch.equal(feed(x, None), wanted), range(200))
    assert all(is_equal)
