from typing import Any

import pytest
import torch

import astrai_serve.model_source
from astrai_core.folder_quantization import quantize_folder
from astrai_core.model import AutoModel, ModelConfig
from astrai_core.model.adapter import adapt
from astrai_core.model.lora import LoRAConfig, lora_layers
from astrai_core.model.quantization import scheme_of
from astrai_serve.model_source import ModelSource

FIELDS: Any = {
    "vocab_size": 300,
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "dim_ffn": 32,
    "max_len": 64,
}
# by hand: embedding, q k v o, gate up down, two block norms and two head norms, the last norm
NUM_PARAMETERS = 300 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16 + 2 * 8 + 16


def write(folder, dtype):
    AutoModel.save_pretrained(AutoModel.from_config(ModelConfig(**FIELDS), dtype), folder)
    return folder


def capabilities(monkeypatch, **features):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)


@pytest.mark.parametrize(
    ("stored", "native", "chosen", "why"),
    [
        (torch.float32, False, torch.float32, "the folder's own"),
        (torch.bfloat16, True, torch.bfloat16, "the folder's own"),
        (torch.bfloat16, False, torch.float32, "does not compute in the folder's bfloat16"),
        (torch.float16, True, torch.float32, "does not compute in the folder's float16"),
    ],
)
def test_auto_is_what_this_cpu_computes_in(tmp_path, monkeypatch, stored, native, chosen, why):
    capabilities(monkeypatch, avx512_bf16=native)
    source = ModelSource.find(write(tmp_path / "m", stored), "auto", is_random=False)
    assert source.dtype is chosen
    assert why in source.why
    assert {weight.dtype for weight in source.load().parameters()} == {chosen}


def test_what_is_asked_for_is_what_is_loaded(tmp_path):
    source = ModelSource.find(write(tmp_path / "m", torch.float32), "bfloat16", is_random=False)
    assert source.load().output_weight.dtype is torch.bfloat16


def test_the_memory_is_said_before_it_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(astrai_serve.model_source, "available_memory", lambda: 3_100_000)
    source = ModelSource.find(write(tmp_path / "m", torch.float32), "auto", is_random=False)
    assert source.num_parameters == NUM_PARAMETERS
    told = source.describe()
    assert f"{NUM_PARAMETERS / 1000:.3g}k parameters" in told
    assert "3.1 MB of memory are free" in told
    monkeypatch.setattr(astrai_serve.model_source, "available_memory", lambda: 10_000)
    with pytest.raises(MemoryError, match=r"only 0\.0 MB are free; --dtype bfloat16"):
        source.describe()


def test_a_yaml_file_is_read_as_training_reads_it(tmp_path):
    file = tmp_path / "one.yaml"
    lines = [f"{name}: {value}" for name, value in FIELDS.items()]
    file.write_text("\n".join([*lines, "norm_eps: 1e-5  # no point", "n_kv_heads: null"]))
    source = ModelSource.find(file, "auto", is_random=True)
    assert source.config == ModelConfig(**FIELDS, norm_eps=1e-5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("dim: [", "one.yaml"),
        ("- 1", "fields of ModelConfig"),
        ("n_head: 2", "did you mean n_heads"),
        ("dim: wide", "dim must be a positive integer, not 'wide'"),
    ],
)
def test_a_wrong_yaml_file_says_so(tmp_path, content, words):
    file = tmp_path / "one.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=words):
        ModelSource.find(file, "auto", is_random=True)


def make_adapter(base, folder):
    model = AutoModel.from_pretrained(base)
    adapt(model, LoRAConfig(rank=2), base)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    AutoModel.save_pretrained(model, folder)
    return model


def test_an_adapter_is_merged_as_it_is_loaded(tmp_path):
    base = write(tmp_path / "m", torch.float32)
    adapted = make_adapter(base, tmp_path / "a")
    ids = torch.arange(9).view(1, 9)
    expected = adapted(ids)["logits"]
    for path, adapter in ((base, tmp_path / "a"), (tmp_path / "a", None)):
        source = ModelSource.find(path, "auto", is_random=False, adapter=adapter)
        assert (source.path.resolve(), source.adapter) == (base.resolve(), tmp_path / "a")
        model = source.load()
        assert not lora_layers(model)
        torch.testing.assert_close(model(ids)["logits"], expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_an_adapter_is_refused(tmp_path):
    make_adapter(write(tmp_path / "m", torch.float32), tmp_path / "a")
    with pytest.raises(ValueError, match="is an adapter itself; pass its base's folder"):
        ModelSource.find(tmp_path / "a", "auto", is_random=False, adapter=tmp_path / "a")


@pytest.mark.parametrize("weights", ["w8a8", "int8", "int4"])
def test_weights_are_rounded_as_they_are_read(tmp_path, weights):
    folder = write(tmp_path / "m", torch.float32)
    plain = ModelSource.find(folder, "auto", False)
    source = ModelSource.find(folder, "auto", False, weights=weights)
    model = source.load()
    assert scheme_of(model) == source.scheme == weights
    assert f"in {weights} weights" in source.describe()
    ids = torch.randint(300, (1, 7))
    with torch.no_grad():
        assert not torch.equal(model(ids)["logits"], plain.load()(ids)["logits"])


def test_a_quantised_folder_is_what_it_is(tmp_path):
    quantize_folder(write(tmp_path / "m", torch.bfloat16), tmp_path / "small", "w8a8")
    source = ModelSource.find(tmp_path / "small", "float32", False)
    assert (source.scheme, source.dtype) == ("w8a8", torch.float32)
    assert scheme_of(source.load()) == "w8a8"
    for weights in ("fp32", "bf16", "int4"):
        with pytest.raises(ValueError, match=f"--weights {weights}: .* holds w8a8 weights"):
            ModelSource.find(tmp_path / "small", "auto", False, weights=weights)


def test_random_weights_and_merged_adapters_are_rounded_too(tmp_path):
    folder = write(tmp_path / "m", torch.float32)
    source = ModelSource.find(folder, "auto", True, weights="w8a8")
    assert scheme_of(source.load()) == "w8a8"
    model = AutoModel.from_pretrained(folder)
    adapt(model, LoRAConfig(rank=2), folder)
    AutoModel.save_pretrained(model, tmp_path / "adapter")
    merged = ModelSource.find(tmp_path / "adapter", "auto", False, weights="w8a8").load()
    assert scheme_of(merged) == "w8a8"
    assert not lora_layers(merged)
    quantize_folder(folder, tmp_path / "small", "w8a8")
    with pytest.raises(ValueError, match="which no adapter can be merged into"):
        ModelSource.find(tmp_path / "small", "auto", False, tmp_path / "adapter")
