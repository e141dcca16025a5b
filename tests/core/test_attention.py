"""Attention against loops over single tokens and heads, written from the formulas."""

import math
from typing import Any

import pytest
import torch

from astrai_core.model import ModelConfig, PackedAttention
from astrai_core.model.attention import GQA, MLA
from astrai_core.model.layers import RMSNorm
from astrai_core.model.rotary import RotaryEmbedding, rotate

LENGTH = 7
DIM = 24


def make(kind: type[GQA] | type[MLA], **fields):
    torch.manual_seed(0)
    layer = kind(ModelConfig(dim=DIM, n_heads=4, **fields), layer=0)
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter) / math.sqrt(parameter.shape[-1])
    return layer.double().eval()


def run(layer, x, rotary_dim: int):
    rotation = RotaryEmbedding(rotary_dim, 1e4)(torch.arange(len(x)))
    return layer(x, rotation, PackedAttention.of_rows(1, len(x)))


def turned(vector, position: int, layer: GQA | MLA):
    """One head turned by its position, pair by pair."""
    result = vector.clone()
    half = len(vector) // 2
    for pair in range(half):
        i, j = (2 * pair, 2 * pair + 1) if layer.is_interleaved else (pair, pair + half)
        angle = position * 1e4 ** (-pair / half)
        cos, sin = math.cos(angle), math.sin(angle)
        result[i], result[j] = (
            vector[i] * cos - vector[j] * sin,
            vector[j] * cos + vector[i] * sin,
        )
    return result


def normed(vector, norm: RMSNorm | None):
    if norm is None:
        return vector
    return vector / (vector.square().mean() + norm.norm_eps).sqrt() * norm.weight


def gqa_by_hand(layer: GQA, x):
    rows = []
    group = layer.n_heads // layer.n_kv_heads
    for position in range(len(x)):
        heads = []
        for head in range(layer.n_heads):
            queries = layer.q_proj(x[position]).view(layer.n_heads, -1)
            query = turned(normed(queries[head], layer.q_norm), position, layer)
            first = 0 if layer.window is None else max(0, position - layer.window + 1)
            scores, values = [], []
            for other in range(first, position + 1):
                key = layer.k_proj(x[other]).view(layer.n_kv_heads, -1)[head // group]
                key = turned(normed(key, layer.k_norm), other, layer)
                scores.append(query @ key / math.sqrt(layer.head_dim))
                values.append(layer.v_proj(x[other]).view(layer.n_kv_heads, -1)[head // group])
            out = torch.stack(scores).softmax(0) @ torch.stack(values)
            if layer.gate_proj is not None:
                gate = layer.gate_proj(x[position]).view(layer.n_heads, -1)[head]
                out = out / (1 + (-gate).exp())
            heads.append(out)
        rows.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_kv_heads": 4, "use_qk_norm": False},
        {"n_kv_heads": 2, "use_qk_norm": False, "attention_bias": True},
        {"n_kv_heads": 2, "attention_output_bias": True, "rope_interleaved": True},
        {"n_kv_heads": 1, "use_qk_norm": True},
        {"n_kv_heads": 2, "use_qk_norm": True, "head_dim": 10},
        {"n_kv_heads": 2, "sliding_window": 3},
        {"n_kv_heads": 2, "use_gated_attention": True, "attention_gate": "elementwise"},
        {"n_kv_heads": 2, "use_gated_attention": True, "attention_gate": "headwise"},
    ],
    ids=str,
)
def test_grouped_queries_equal_the_formula(fields):
    layer, x = make(GQA, **fields), torch.randn(LENGTH, DIM, dtype=torch.float64)
    assert isinstance(layer, GQA)
    torch.testing.assert_close(
        run(layer, x, layer.head_dim), gqa_by_hand(layer, x), atol=1e-5, rtol=1e-5
    )


def test_norm_and_rotation_do_not_commute():
    """So the formula's order, norm first, is really tested above."""
    x, (cos, sin) = torch.randn(1, 1, 8), RotaryEmbedding(8, 1e4)(torch.tensor([3]))
    norm = RMSNorm(8, 1e-6)
    norm.weight.data = torch.rand(8)
    assert (norm(rotate(x, cos, sin)) - rotate(norm(x), cos, sin)).abs().max() > 1e-3


LATENT: dict[str, Any] = {
    "attn_type": "mla",
    "use_qk_norm": False,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}


def mla_by_hand(layer: MLA, x):
    """DeepSeek's formula with all heads built out, one pair of tokens at a time."""
    queries = layer.q_proj(x) if layer.q_proj is not None else None
    if queries is None:
        assert layer.q_a_proj is not None
        assert layer.q_b_proj is not None
        latent = torch.stack([normed(row, layer.q_a_layernorm) for row in layer.q_a_proj(x)])
        queries = layer.q_b_proj(latent)
    compressed = layer.kv_a_proj_with_mqa(x)
    rows = []
    for position in range(len(x)):
        heads = []
        for head in range(layer.n_heads):
            query = queries[position].view(layer.n_heads, -1)[head]
            query = torch.cat((query[:6], turned(query[6:], position, layer)))
            first = 0 if layer.window is None else max(0, position - layer.window + 1)
            scores, values = [], []
            for other in range(first, position + 1):
                built = layer.kv_b_proj(normed(compressed[other, :12], layer.kv_a_layernorm))
                built = built.view(layer.n_heads, -1)[head]
                key = torch.cat((built[:6], turned(compressed[other, 12:], other, layer)))
                scores.append(query @ key / math.sqrt(10))
                values.append(built[6:])
            out = torch.stack(scores).softmax(0) @ torch.stack(values)
            if layer.gate_proj is not None:
                out = out * layer.gate_proj(x[position]).view(layer.n_heads, -1)[head].sigmoid()
            heads.append(out)
        rows.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"q_lora_rank": 9, "attention_bias": True, "attention_output_bias": True},
        {"q_lora_rank": 9, "latent_norm_eps": 0.5, "norm_eps": 1e-6, "rope_interleaved": True},
        {"sliding_window": 3},
        {"use_gated_attention": True, "attention_gate": "elementwise"},
    ],
    ids=str,
)
def test_latent_attention_equals_the_formula_built_out_and_absorbed(fields):
    layer, x = make(MLA, **LATENT, **fields), torch.randn(LENGTH, DIM, dtype=torch.float64)
    assert isinstance(layer, MLA)
    wanted = mla_by_hand(layer, x)
    for is_training in (True, False):
        torch.testing.assert_close(
            run(layer.train(is_training), x, 4), wanted, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", [GQA, MLA])
def test_biases_stand_where_the_configuration_puts_them(kind):
    """Qwen2 has them on q, k and v; DeepSeek on the projections to the latents; Llama on all."""

    def biased(**fields) -> set[str]:
        latent = {**LATENT, "q_lora_rank": 9} if kind is MLA else {}
        names = (name for name, _ in make(kind, **latent, **fields).named_parameters())
        return {name.removesuffix(".bias") for name in names if name.endswith(".bias")}

    inputs = {"q_a_proj", "kv_a_proj_with_mqa"} if kind is MLA else {"q_proj", "k_proj", "v_proj"}
    assert biased() == set()
    assert biased(attention_bias=True) == inputs
    assert biased(attention_output_bias=True) == {"o_proj"}


def test_latent_attention_has_the_same_gradients_both_ways():
    layer, x = make(MLA, **LATENT).float(), torch.randn(LENGTH, DIM)
    grads = []
    for is_training in (True, False):
        layer.zero_grad()
        run(layer.train(is_training), x, 4).square().sum().backward()
        grads.append({name: p.grad for name, p in layer.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)


def test_the_absorbed_form_stores_one_narrow_head():
    """What a cache would hold is what the configuration announces."""
    seen = []

    class Watch(PackedAttention):
        def attend(self, layer, q, k, v, *, scale, window=None):
            seen.append((tuple(k.shape), v))
            return super().attend(layer, q, k, v, scale=scale, window=window)

    layer, x = make(MLA, **LATENT).float(), torch.randn(LENGTH, DIM)
    layer(x, RotaryEmbedding(4, 1e4)(torch.arange(LENGTH)), Watch(None, (1, LENGTH)))
    heads, width, value_width = ModelConfig(**LATENT).cache_shape
    assert seen == [((LENGTH, heads, width), 12)]
    assert value_width == 0
