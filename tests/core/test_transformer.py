import math

import pytest
import torch

from astrai_core.model import DecoderBlock, ModelConfig, PackedAttention, Transformer
from astrai_core.model.attention import GQA

SMALL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "dim_ffn": 48, "n_heads": 4, "n_kv_heads": 2}


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
