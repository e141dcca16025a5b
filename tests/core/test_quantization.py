import pytest
import torch

from astrai_core.model import ModelConfig, Transformer, quantization
from astrai_core.model.layers import Linear
from astrai_core.model.quantization import W8A8Linear, quantize_, quantize_rows


def test_rows_are_within_half_a_step():
    x = torch.cat((torch.randn(6, 40), torch.zeros(1, 40)))
    values, scale = quantize_rows(x)
    assert ((values * scale - x).abs() <= scale / 2 + 1e-6).all()


@pytest.mark.parametrize("kernel", [quantization._onednn, quantization._int_mm])
def test_integer_kernels_agree_with_int64(kernel):
    if kernel is quantization._onednn and quantization.integer_kernel() is not kernel:
        pytest.skip("oneDNN has no exact kernel for this processor")
    values = torch.randint(-127, 128, (9, 64), dtype=torch.int8)
    weight = torch.randint(-127, 128, (24, 64), dtype=torch.int8)
    result = kernel(values, weight, -7)
    quantization._packed_weights.pop(-7, None)
    assert torch.equal(result.long(), values.long() @ weight.long().t())


def test_a_kernel_that_saturates_is_refused():
    def saturating(values, weight, handle):
        return (values.double() @ weight.double().t()).clamp(max=32767)

    assert not quantization._is_exact(saturating)


def test_a_token_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    layer, x = W8A8Linear.from_linear(Linear(96, 40)), torch.randn(33, 96)
    together = layer(x)
    assert all(torch.equal(layer(x[n : n + 1])[0], together[n]) for n in range(33))


def test_rows_of_any_shape_are_rows():
    torch.manual_seed(0)
    layer, x = W8A8Linear.from_linear(Linear(16, 8, bias=True)), torch.randn(2, 3, 16)
    assert torch.equal(layer(x), layer(x.flatten(0, 1)).view(2, 3, 8))
    assert torch.equal(layer(x[0, 0]), layer(x)[0, 0])
    assert layer(x[:0]).shape == (0, 3, 8)


def test_a_quantised_model_compiles_and_stays_close():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=64, dim=64, n_layers=2, dim_ffn=96)).eval()
    for parameter in model.parameters():
        parameter.data *= 3
    ids = torch.randint(64, (1, 12))
    with torch.no_grad():
        exact = model(ids)["logits"]
        quantised = quantize_(model)(ids)["logits"]
        compiled = torch.compile(model.hidden_states, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model.project(compiled(ids)), quantised)
    assert 0 < (quantised - exact).norm() / exact.norm() < 0.1
