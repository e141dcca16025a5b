"""Packed latent attention: the layers it is made of, and rows that stand alone."""

import functools
from typing import Any

import pytest
import torch

from astrai_core.model import AttentionContext, ModelConfig, Transformer
from astrai_core.model.attention import MLA
from astrai_core.model.fusion import FusedBlock, packed_mla, why_not_fused
from astrai_core.model.packed_latent import PackedMLA, why_not_packed_latent
from astrai_core.model.quantization import quantize_
from astrai_core.model.rowwise import RowwiseMLA

from .noisy_block import SMALL, noisy_block

WHY_NOT = why_not_fused() or why_not_packed_latent()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.usefixtures("packed_threads"),
]
SHAPE: dict[str, Any] = {
    "n_heads": 3, "attn_type": "mla", "use_qk_norm": False, "kv_lora_rank": 72,
    "qk_nope_head_dim": 20, "qk_rope_head_dim": 12, "v_head_dim": 40,
}  # fmt: skip
block_of = functools.partial(noisy_block, **SHAPE)
KINDS: dict[str, dict[str, Any]] = {
    "direct": {},
    "latent queries, interleaved": {"q_lora_rank": 56, "rope_interleaved": True},
}


class Own(AttentionContext):
    """A token attends to itself alone, with a weight that its score decides."""

    def attend(self, layer, q, k, v, *, scale, window=None):
        assert isinstance(v, int)
        score = (q.double() * k.double()).sum(-1, keepdim=True) * scale
        return (score.sigmoid() * k.double())[..., :v].to(q.dtype)


def inputs(count, dtype=torch.float32):
    torch.manual_seed(1)
    x, angle = torch.randn(count, 96).to(dtype), torch.randn(count, 6)
    return x, (angle.cos(), angle.sin())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("count", [1, 7, 70])
def test_it_is_the_attention_it_was_made_of(changes, dtype, count):
    block, (x, rotation) = block_of(dtype, **changes), inputs(count, dtype)
    attention, norm = block.self_attn, block.input_layernorm
    assert isinstance(attention, RowwiseMLA)
    wanted = attention(norm(x), rotation, Own())
    block.pack_()
    assert isinstance(block.self_attn, PackedMLA)
    add = block.self_attn.function(norm.weight, norm.norm_eps)
    # what is rounded to int8 may be rounded to the next of 127 steps
    close = 0.01 if dtype == torch.float32 else 0.03
    got = add(x, rotation, Own())
    assert got.dtype == dtype
    difference = (got.float() - x.float() - wanted.float()).abs().max()
    assert difference < close * wanted.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", KINDS.values(), ids=list(KINDS))
def test_a_row_has_the_same_bits_alone(changes, dtype):
    block, (x, (cos, sin)) = block_of(dtype, **changes), inputs(61, dtype)
    block.pack_()
    alone = torch.cat(
        [block(x[n : n + 1], (cos[n : n + 1], sin[n : n + 1]), Own()) for n in range(61)]
    )
    for count in (2, 3, 5, 6, 7, 13, 48, 49, 61):
        assert torch.equal(block(x[:count], (cos[:count], sin[:count]), Own()), alone[:count])
        last = slice(61 - count, 61)
        assert torch.equal(block(x[last], (cos[last], sin[last]), Own()), alone[last])


def test_what_is_no_number_stays_in_its_row():
    block, (x, rotation) = block_of(), inputs(9)
    block.pack_()
    wanted = block(x, rotation, Own())
    x[4, 3] = torch.nan
    out = block(x, rotation, Own())
    is_other = torch.arange(9) != 4
    assert out[4].isnan().all()
    assert torch.equal(out[is_other], wanted[is_other])


@pytest.mark.parametrize(
    "changes", [{"use_gated_attention": True}, {"attention_bias": True, "q_lora_rank": 56}], ids=str
)
def test_gates_and_biases_stay_with_single_operators(changes):
    block, (x, rotation) = block_of(**changes), inputs(5)
    wanted = block(x, rotation, Own())
    assert isinstance(block.self_attn, RowwiseMLA)
    block.pack_()
    assert isinstance(block.self_attn, RowwiseMLA)
    assert packed_mla(block.self_attn) is None
    torch.testing.assert_close(block(x, rotation, Own()), wanted, atol=0.02, rtol=0.02)


def test_a_folded_head_is_the_product_it_stands_for():
    """The queries of a head, against the layers of `MLA` in 64 bits."""
    torch.manual_seed(0)
    plain = Transformer(ModelConfig(**SMALL, **SHAPE)).eval()
    layer = plain.get_submodule("layers.0.self_attn")
    assert isinstance(layer, MLA)
    to_key = layer.kv_b_proj.weight.detach().view(3, 60, 72)[:, :20].double()  # (H, P, r)
    quantize_(plain, "w8a8")
    block = FusedBlock(plain.get_submodule("layers.0"))  # pyright: ignore[reportArgumentType]
    block.pack_()
    attention, norm = block.self_attn, block.input_layernorm
    assert isinstance(attention, PackedMLA)
    x, (cos, sin) = inputs(50)
    heads = attention.q_proj(norm(x)).view(50, 3, 32)  # pyright: ignore[reportOptionalCall]
    seen = []

    class Seen(Own):
        def attend(self, layer, q, k, v, *, scale, window=None):
            seen.append(q)
            return super().attend(layer, q, k, v, scale=scale, window=window)

    attention.function(norm.weight, norm.norm_eps)(x, (cos, sin), Seen())
    wanted = torch.einsum("nhp,hpr->nhr", heads[..., :20].double(), to_key)
    torch.testing.assert_close(seen[0][..., :72].double(), wanted, rtol=1e-3, atol=1e-4)
