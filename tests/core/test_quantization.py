from typing import Any

import pytest
import torch
import torch.nn.functional as F

from astrai_core.model import ModelConfig, Transformer
from astrai_core.model.layers import Embedding, Linear
from astrai_core.model.quantization import (
    SCHEMES,
    Int4Linear,
    Int8Linear,
    QuantisedEmbedding,
    W8A8Linear,
    choose,
    dequantize,
    kernels,
    native,
    quantize_,
    quantize_groups,
    quantize_rows,
    scheme_of,
    unpack,
)

FORMS = pytest.mark.parametrize("form", [W8A8Linear, Int8Linear, Int4Linear])
SHAPE: dict[str, Any] = {"vocab_size": 64, "dim": 64, "n_layers": 2, "dim_ffn": 96, "n_heads": 4}
MODELS = {
    "gated": ModelConfig(**SHAPE, use_gated_attention=True, tie_weight=False),
    "mla": ModelConfig(
        **SHAPE,
        attn_type="mla",
        use_qk_norm=False,
        kv_lora_rank=16,
        q_lora_rank=32,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "moe": ModelConfig(
        **SHAPE,
        ffn_type="moe",
        n_routed_experts=4,
        n_shared_experts=1,
        n_activated_experts=2,
        dim_ffn_expert=32,
    ),
}


def build(config):
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return model


def test_rows_are_within_half_a_step():
    x = torch.cat((torch.randn(6, 40), torch.zeros(1, 40)))
    values, scale = quantize_rows(x)
    assert ((values * scale - x).abs() <= scale / 2 + 1e-6).all()


def test_four_bits_by_hand():
    x = torch.zeros(1, 16)
    x[0, :4] = torch.tensor([-8.0, 7.0, 3.4, -0.4])
    packed, scale = quantize_groups(x)
    # no finer step than 1 has a smaller error, for it would clip -8 to more than it gains
    assert scale.tolist() == [[1.0]]
    assert packed[0, :2].tolist() == [(-8 + 8) | (7 + 8) << 4, (3 + 8) | (0 + 8) << 4]
    assert dequantize(unpack(packed), scale)[0, :4].tolist() == [-8, 7, 3, 0]


def test_groups_of_four_bits_are_close_and_clip_one_value_at_most_a_little():
    torch.manual_seed(0)
    x = torch.randn(8, 128)
    packed, scale = quantize_groups(x)
    assert packed.shape == (8, 64)
    assert scale.shape == (8, 2)
    error = dequantize(unpack(packed), scale) - x
    assert error.norm() / x.norm() < 0.1
    assert (quantize_groups(torch.zeros(2, 16))[0] == 0x88).all()


def test_a_width_that_has_no_groups_is_refused_by_layer():
    with pytest.raises(ValueError, match=r"q_proj: int4 .* multiple of 16, not 24"):
        quantize_(Transformer(ModelConfig(vocab_size=8, dim=24, n_layers=1, n_heads=2)), "int4")


@pytest.mark.parametrize("name", kernels.TORCH_KERNELS)
def test_torch_kernels_agree_with_int64_or_are_not_used(name):
    kernel = kernels.TORCH_KERNELS[name]
    if not kernels.is_exact(kernel):
        pytest.skip(f"{name} is not exact on this processor, and refused")
    values = torch.randint(-127, 128, (9, 64), dtype=torch.int8)
    weight = torch.randint(-127, 128, (24, 64), dtype=torch.int8)
    result = kernel(values, weight, -7)
    kernels.forget(-7)
    assert torch.equal(result.long(), values.long() @ weight.long().t())


def test_a_kernel_that_saturates_is_refused():
    def saturating(values, weight, handle):
        return (values.double() @ weight.double().t()).clamp(max=32767)

    assert not kernels.is_exact(saturating)


@pytest.mark.parametrize("inputs", [16, 48, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_w8a8_is_the_arithmetic_at_the_head_of_the_file(inputs, dtype):
    torch.manual_seed(0)
    layer, x = W8A8Linear.from_linear(Linear(inputs, 37)), torch.randn(11, inputs).to(dtype)
    values, scale = quantize_rows(x)
    total = (values.long() @ layer.weight.long().t()).float()
    assert torch.equal(layer(x), (total * layer.weight_scale * scale).to(dtype))
    by_torch = kernels.w8a8_linear(x, layer.weight, layer.weight_scale, layer.handle)
    assert torch.equal(layer(x), by_torch)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_compute_what_their_dequantised_weight_does(form, dtype):
    torch.manual_seed(0)
    plain, x = Linear(80, 37, bias=True), torch.randn(9, 80).to(dtype)
    assert plain.bias is not None
    torch.nn.init.normal_(plain.bias)
    layer = form.from_linear(plain)
    reference = F.linear(x.float(), layer.dequantize(), plain.bias).to(dtype)
    # w8a8 rounds x too, to 8 bits
    tolerance = 5e-2 if form is W8A8Linear or dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(layer(x), reference, atol=tolerance, rtol=tolerance)


@FORMS
def test_a_token_does_not_depend_on_its_neighbours(form):
    if form is not W8A8Linear and not choose().is_native:
        pytest.skip("torch's floating-point kernels sum in an order that depends on the batch")
    torch.manual_seed(0)
    layer, x = form.from_linear(Linear(96, 40)), torch.randn(64, 96)
    together = layer(x)
    assert all(torch.equal(layer(x[n : n + 1])[0], together[n]) for n in range(64))
    assert all(torch.equal(layer(x[:n]), together[:n]) for n in range(1, 65))


@FORMS
def test_rows_of_any_shape_are_rows(form):
    torch.manual_seed(0)
    layer, x = form.from_linear(Linear(16, 8, bias=True)), torch.randn(2, 3, 16)
    assert torch.equal(layer(x), layer(x.flatten(0, 1)).view(2, 3, 8))
    assert torch.equal(layer(x[0, 0]), layer(x)[0, 0])
    assert torch.equal(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))
    assert layer(x[:0]).shape == (0, 3, 8)


@FORMS
def test_what_is_no_number_stays_none_and_hurts_no_other_row(form):
    torch.manual_seed(0)
    layer, x = form.from_linear(Linear(32, 8)), torch.randn(3, 32)
    clean = layer(x)
    x[0, 3], x[2, 5] = torch.nan, torch.inf
    out = layer(x)
    assert not out[0].isfinite().any()
    assert not out[2].isfinite().any()
    assert torch.equal(out[1], clean[1])


@FORMS
def test_gradients_reach_what_lies_before_a_frozen_layer(form):
    torch.manual_seed(0)
    layer, x = form.from_linear(Linear(32, 8)), torch.randn(5, 32, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(5, 32))


@pytest.mark.parametrize("rounds_inputs", [True, False])
def test_an_embedding_is_looked_up_and_multiplied_by(rounds_inputs):
    torch.manual_seed(0)
    plain = Embedding(50, 32)
    pair = QuantisedEmbedding.quantize(plain.weight)
    layer, ids = (
        QuantisedEmbedding(*pair, rounds_inputs=rounds_inputs),
        torch.tensor([[3, 49], [0, 3]]),
    )
    assert torch.equal(layer(ids), layer.dequantize()[ids])
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(layer.project(x), x @ layer.dequantize().t(), atol=5e-3, rtol=5e-2)


def test_scales_stay_float32_whatever_the_model_becomes():
    layer = W8A8Linear.from_linear(Linear(16, 8, bias=True)).to(torch.bfloat16)
    assert layer.weight_scale.dtype is torch.float32
    assert layer.bias is not None
    assert layer.bias.dtype is torch.bfloat16
    assert layer(torch.randn(2, 16, dtype=torch.bfloat16)).dtype is torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_a_quantised_model_stays_close_and_compiles(name, scheme):
    model = build(MODELS[name])
    ids = torch.randint(64, (1, 12))
    with torch.no_grad():
        exact = model(ids)["logits"]
        quantised = quantize_(model, scheme)(ids)["logits"]
        assert scheme_of(model) == scheme
        if name == "gated" and scheme == "w8a8":
            compiled = torch.compile(model.hidden_states, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(model.project(compiled(ids)), quantised)
    assert 0 < (quantised - exact).norm() / exact.norm() < (0.5 if scheme == "int4" else 0.1)
    with pytest.raises(TypeError, match="output layer is quantised"):
        _ = model.output_weight


def test_without_a_compiler_the_reason_is_said_and_torch_does_it(monkeypatch):
    def fail():
        raise native.NativeError("there is no C++ compiler (g++)")

    monkeypatch.setattr(native, "load", fail)
    choice = choose.__wrapped__()
    assert not choice.is_native
    assert "there is no C++ compiler (g++)" in choice.reason
    assert kernels.is_exact(choice.kernel)


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "linear.cpp"
    source.write_text("this is not C++")
    with pytest.raises(native.NativeError, match=r"failed: .*error"):
        native.load_source(source)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.NativeError, match="no C\\+\\+ compiler"):
        native.load_source(source)
