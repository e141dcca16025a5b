import cmath

import pytest
import torch

from astrai_core.model.rope_scaling import RopeScaling
from astrai_core.model.rotary import RotaryEmbedding, latent_score_factor, rotate


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


def test_interleaved_pairs_turn_alike_and_come_out_first_channels_first():
    x, rotation = torch.randn(5, 2, 6), RotaryEmbedding(6, 1e4)(torch.arange(5))
    apart = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
    assert torch.equal(rotate(x, *rotation, interleaved=True), rotate(apart, *rotation))


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    """Base 2: the eight pairs have wavelengths 2 pi 2^(i/8), once around in 6.3 to 11.5 tokens."""
    scaling = RopeScaling(
        rope_type="llama3",
        factor=8.0,
        original_max_len=20,
        low_freq_factor=2.0,  # longer than 10 tokens: stretched whole
        high_freq_factor=2.5,  # shorter than 8 tokens: kept
    )
    plain = RotaryEmbedding(16, 2.0).frequencies(torch.device("cpu"))
    found = RotaryEmbedding(16, 2.0, scaling).frequencies(torch.device("cpu"))
    wavelengths = [6.28, 6.85, 7.47, 8.15, 8.89, 9.69, 10.57, 11.52]
    for wave, before, after in zip(wavelengths, plain.tolist(), found.tolist(), strict=True):
        if wave < 8:
            assert after == before
        elif wave > 10:
            assert after == before / 8
        else:
            assert before / 8 < after < before


def test_the_temperature_of_all_channels_scales_query_and_key():
    scaling = RopeScaling(
        rope_type="yarn", factor=40.0, original_max_len=4096, mscale=1.0, mscale_all_dim=1.0
    )
    assert latent_score_factor(scaling) == pytest.approx((0.1 * 3.688879454 + 1) ** 2)
    assert RotaryEmbedding(8, 1e4, scaling).amplitude == 1  # mscale over mscale_all_dim
    assert latent_score_factor(None) == 1


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


@pytest.mark.parity
@pytest.mark.parametrize(
    "rule",
    [
        {"rope_type": "linear", "factor": 2.5},
        LLAMA3,
        {**LLAMA3, "factor": 32.0, "low_freq_factor": 1.5},
        YARN,
        {**YARN, "beta_fast": 16, "beta_slow": 2},
        {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5},
        {**YARN, "mscale": 0.707},
        {**YARN, "attention_factor": 1.25},
        {**YARN, "truncate": False},
        {**YARN, "factor": 1.0},
    ],
    ids=lambda rule: " ".join(map(str, rule.values())),
)
@pytest.mark.parametrize(("dim", "base"), [(64, 1e4), (20, 5e5), (128, 1e6)])
def test_stretched_angles_are_those_of_transformers_to_the_bit(rule, dim, base):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(
        head_dim=dim, rope_parameters={**rule, "rope_theta": base}, max_position_embeddings=163_840
    )
    positions = torch.tensor([0, 1, 5, 4095, 131_071])
    cos, sin = modeling.LlamaRotaryEmbedding(config)(torch.ones(1), positions[None])
    fields = {k.replace("position_embeddings", "len"): v for k, v in rule.items()}
    ours = RotaryEmbedding(dim, base, RopeScaling(**fields))(positions)
    assert torch.equal(ours[0], cos[0, :, : dim // 2])
    assert torch.equal(ours[1], sin[0, :, : dim // 2])


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
