import math
from typing import Any

import pytest
import torch

from astrai_core.model import DecoderBlock, ModelConfig, PackedAttention, Transformer
from astrai_core.model.attention import GQA

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "dim": 32,
    "n_layers": 2,
    "dim_ffn": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
}


def make(**changes) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SMALL, **changes})).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def test_the_future_is_not_seen():
    model, ids = make(), torch.randint(50, (1, 8))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 50
    before, after = model(ids)["logits"], model(changed)["logits"]
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.equal(before[0, 5], after[0, 5])


def test_the_window_bounds_what_is_seen():
    model, ids = make(sliding_window=3, n_layers=1), torch.randint(50, (1, 8))
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % 50
    same = (model(ids)["logits"] == model(changed)["logits"]).all(-1)[0]
    assert same.tolist() == [True, True, False, False, False, True, True, True]


def test_logits_at_picks_flattened_positions():
    model, ids = make(tie_weight=False), torch.randint(50, (2, 6))
    picked = model(ids, logits_at=torch.tensor([1, 7]))["logits"]
    torch.testing.assert_close(picked, model(ids)["logits"].flatten(0, 1)[[1, 7]])


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_the_gate_scales_what_attention_adds(gate):
    """Attention of one token is its own value, so the block can be worked out by hand."""
    model = make(use_gated_attention=True, attention_gate=gate, n_layers=1)
    block, x = model.layers[0], torch.randn(1, 32)
    assert isinstance(block, DecoderBlock)
    attention = block.self_attn
    assert isinstance(attention, GQA)
    assert attention.gate_proj is not None
    rotation = model.rotary_embedding(torch.zeros(1))
    value = attention.v_proj(x).view(2, 8).repeat_interleave(2, 0)
    gate_value = 1 / (1 + math.e ** -attention.gate_proj(x).view(4, -1))
    wanted = attention.o_proj((value * gate_value).view(1, -1))
    torch.testing.assert_close(attention(x, rotation, PackedAttention.of_rows(1, 1)), wanted)


def test_tied_weights_are_one_tensor_and_untied_two():
    tied, untied = make(), make(tie_weight=False)
    assert tied.output_weight is tied.embed_tokens.weight
    assert untied.output_weight is not untied.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()


def test_positions_restart_without_changing_anything_relative():
    """RoPE is relative: shifting all positions of a document leaves its logits alone."""
    model, ids = make(), torch.randint(50, (1, 6))
    shifted = model(ids, torch.arange(100, 106)[None])["logits"]
    torch.testing.assert_close(shifted, model(ids)["logits"], atol=1e-4, rtol=1e-4)


def test_flat_tokens_need_a_context():
    with pytest.raises(ValueError, match="without an attention context"):
        make()(torch.arange(5))


def test_logits_and_hidden_states_belong_together():
    model, ids = make(tie_weight=False), torch.randint(50, (2, 6))
    out = model(ids)
    assert out["hidden_states"].shape == (2, 6, 32)
    torch.testing.assert_close(out["logits"], out["hidden_states"] @ model.output_weight.t())


def test_a_tied_matrix_learns_from_both_ends():
    model = make()
    model(torch.tensor([[3, 4]]))["logits"][0, :, 7].sum().backward()
    grad = model.embed_tokens.weight.grad
    assert grad is not None
    assert [row.any().item() for row in grad[[3, 4, 7, 9]]] == [True, True, True, False]


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_the_meta_device_can_be_drawn(tied):
    config = ModelConfig(**SMALL, tie_weight=tied, attention_bias=True)
    with torch.device("meta"):
        model = Transformer(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    torch.manual_seed(5)
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert all((norm == 1).all() for norm in norms)
    assert model(torch.randint(50, (1, 4)))["logits"].isfinite().all()


def test_what_is_added_to_the_stream_starts_smaller_with_depth():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=9, dim=256, n_layers=8, dim_ffn=512))
    projections = [
        p for n, p in model.named_parameters() if n.endswith(("o_proj.weight", "down_proj.weight"))
    ]
    assert len(projections) == 16
    assert all(abs(p.std().item() / (0.02 / 4) - 1) < 0.05 for p in projections)


def test_one_token_at_a_time_from_any_shape():
    """With a context the ids may be flat, as the engine passes them."""
    model, ids = make(), torch.randint(50, (2, 5))
    flat = model(ids.flatten(), torch.arange(5).repeat(2), PackedAttention.of_rows(2, 5))
    torch.testing.assert_close(flat["logits"].view(2, 5, -1), model(ids)["logits"])


def test_autocast_to_bfloat16_stays_close():
    model, ids = make(), torch.randint(50, (2, 6))
    exact = model(ids)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids)["logits"]
    assert 0 < (rough.float() - exact).norm() / exact.norm() < 0.05
