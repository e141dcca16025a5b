import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from astrai_core.cli import main
from astrai_core.folder_quantization import quantize_folder
from astrai_core.model import AutoModel, ModelConfig
from astrai_core.model.quantization import SCHEMES, quantize_, scheme_of
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.modules import SFTModule

SHAPE: dict[str, Any] = {"vocab_size": 300, "dim": 32, "n_layers": 2, "dim_ffn": 48, "n_heads": 2}
MODELS = {
    "tied": ModelConfig(**SHAPE),
    "untied, with biases": ModelConfig(**SHAPE, tie_weight=False, attention_bias=True),
    "mla, moe": ModelConfig(
        **SHAPE,
        attn_type="mla",
        use_qk_norm=False,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        ffn_type="moe",
        n_routed_experts=4,
        n_shared_experts=1,
        n_activated_experts=2,
        dim_ffn_expert=32,
        moe_topk_method="noaux_tc",
        moe_scoring="sigmoid",
    ),
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "plain"
    AutoModel.save_pretrained(AutoModel.from_config(MODELS["tied"]), path)
    AutoTokenizer.train([], 259).save_pretrained(path)
    (path / "generation_config.json").write_text('{"temperature": 0.5}')
    return path


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_bit_for_bit_what_is_quantised_in_memory(name, scheme, tmp_path):
    torch.manual_seed(0)
    AutoModel.save_pretrained(AutoModel.from_config(MODELS[name]), tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "small", scheme)
    in_memory = quantize_(AutoModel.from_pretrained(tmp_path / "plain"), scheme)
    loaded = AutoModel.from_pretrained(tmp_path / "small")
    streamed = AutoModel.from_pretrained(tmp_path / "plain", scheme=scheme)
    assert_equal(loaded.state_dict(), in_memory.state_dict())
    assert_equal(streamed.state_dict(), in_memory.state_dict())
    assert scheme_of(loaded) == scheme
    ids = torch.randint(300, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids)["logits"], in_memory(ids)["logits"])


def test_the_command_copies_what_lies_beside_the_weights(folder, tmp_path, capsys):
    main(["quantize", str(folder), "--out", str(tmp_path / "small")])
    assert "w8a8 weights, 0.0 MB instead of 0.1" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        path.name for path in folder.iterdir()
    }
    content = json.loads((tmp_path / "small" / "config.json").read_text())
    wanted = {"quant_method": "astrai", "version": 1, "scheme": "w8a8"}
    assert content["quantization_config"] == wanted
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "small")]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint
    main(["info", str(tmp_path / "small")])
    assert "I8, F32 in 1 file" in capsys.readouterr().out


def test_a_saved_quantised_model_is_a_quantised_folder(folder, tmp_path):
    model = AutoModel.from_pretrained(folder, scheme="int4")
    AutoModel.save_pretrained(model, tmp_path / "saved")
    assert_equal(AutoModel.from_pretrained(tmp_path / "saved").state_dict(), model.state_dict())


def test_the_rest_is_in_the_type_asked_for_and_scales_are_not(folder, tmp_path):
    quantize_folder(folder, tmp_path / "small", "w8a8")
    model = AutoModel.from_pretrained(tmp_path / "small", torch.bfloat16)
    assert model.dtype is torch.bfloat16
    scales = {t.dtype for name, t in model.state_dict().items() if name.endswith("_scale")}
    assert scales == {torch.float32}
    assert model(torch.zeros(1, 3, dtype=torch.int64))["logits"].dtype is torch.bfloat16


def without_scales(tensors):
    return {name: t for name, t in tensors.items() if not name.endswith("o_proj.weight_scale")}


def with_wide_integers(tensors):
    return {name: t.int() if t.dtype == torch.int8 else t for name, t in tensors.items()}


def with_another_shape(tensors):
    return {name: t[:, :-2].contiguous() if t.dim() == 2 else t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without_scales, r"lacks layers\.0\.self_attn\.o_proj\.weight_scale"),
        (with_wide_integers, "numbers of another kind"),
        (with_another_shape, "has shape"),
    ],
)
def test_a_folder_with_other_tensors_is_refused(damage, told, folder, tmp_path):
    quantize_folder(folder, tmp_path / "small", "w8a8")
    file = tmp_path / "small" / "model.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(ValueError, match=told):
        AutoModel.from_pretrained(tmp_path / "small")


def test_a_truncated_folder_is_refused(folder, tmp_path):
    quantize_folder(folder, tmp_path / "small", "w8a8")
    file = tmp_path / "small" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        AutoModel.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"quant_method": "astrai", "version": 1, "scheme": "w2"}, "'w2'; known are w8a8"),
        ({"quant_method": "astrai", "version": 2, "scheme": "w8a8"}, "version 2, known is 1"),
        ({"quant_method": "gptq"}, "quantization_config"),
        (None, "unknown tensor|numbers of another kind"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(entry, told, folder, tmp_path):
    quantize_folder(folder, tmp_path / "small", "w8a8")
    file = tmp_path / "small" / "config.json"
    content = json.loads(file.read_text())
    del content["quantization_config"]
    if entry is not None:
        content["quantization_config"] = entry
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told):
        AutoModel.from_pretrained(tmp_path / "small")


def test_what_was_rounded_is_neither_rounded_again_nor_trained(folder, tmp_path, capsys):
    small = tmp_path / "small"
    quantize_folder(folder, small, "w8a8")
    with pytest.raises(ValueError, match="w8a8 weights, which cannot become int4"):
        AutoModel.from_pretrained(small, scheme="int4")
    assert scheme_of(AutoModel.from_pretrained(small, scheme="w8a8")) == "w8a8"
    with pytest.raises(ValueError, match="w8a8 weights, which cannot learn"):
        SFTModule(init_from=small)
    with pytest.raises(SystemExit):
        main(["quantize", str(small), "--out", str(tmp_path / "again")])
    assert "holds w8a8 weights already" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["plain", "plain/inside", "."])
def test_no_place_is_taken_from_something_else(place, folder, tmp_path):
    with pytest.raises(ValueError, match="--out"):
        quantize_folder(folder, tmp_path / place, "w8a8")
    assert AutoModel.from_pretrained(folder) is not None
