import cmath

import pytest
import torch

from astrai_core.model.rotary import RotaryEmbedding, rotate


def test_channel_i_turns_with_channel_i_plus_half():
    """Two channels D/2 apart are a complex number, turned by position * base^(-2i/D)."""
    x, position, base = torch.randn(1, 1, 6), 7, 100.0
    turned = rotate(x, *RotaryEmbedding(6, base)(torch.tensor([position])))[0, 0]
    for i in range(3):
        number = complex(x[0, 0, i], x[0, 0, i + 3]) * cmath.exp(
            1j * position * base ** (-2 * i / 6)
        )
        torch.testing.assert_close(turned[i].item(), number.real, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(turned[i + 3].item(), number.imag, atol=1e-5, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_angles_are_those_of_llama_at_far_positions_too(base):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(
        head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": base}
    )
    positions = torch.tensor([0, 1, 5, 2047, 131_071])
    q, k = torch.randn(1, 4, 5, 64), torch.randn(1, 2, 5, 64)
    theirs = modeling.LlamaRotaryEmbedding(config)(q, positions[None])
    their_q, their_k = modeling.apply_rotary_pos_emb(q, k, *theirs)
    cos, sin = RotaryEmbedding(64, base)(positions)
    assert torch.equal(theirs[0][0], torch.cat((cos, cos), -1))
    for x, wanted in ((q, their_q), (k, their_k)):
        torch.testing.assert_close(
            rotate(x[0].transpose(0, 1), cos, sin), wanted[0].transpose(0, 1)
        )


def test_angles_keep_their_precision_in_a_model_of_bfloat16():
    positions = torch.tensor([100_000])
    exact, rounded = RotaryEmbedding(8, 1e4), RotaryEmbedding(8, 1e4).bfloat16()
    assert torch.equal(exact(positions)[0], rounded(positions)[0])
    assert (
        rotate(torch.ones(1, 2, 8, dtype=torch.bfloat16), *rounded(positions)).dtype
        == torch.bfloat16
    )
