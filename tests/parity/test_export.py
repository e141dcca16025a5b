"""Folders of ours written for transformers: its own classes give the same logits, ids and chats."""

import dataclasses
import json
import logging

import pytest
import torch

from astrai_core.folder_export import choose_family, export_huggingface
from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.tokenizer import AutoTokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

MLA = {
    "attn_type": "mla",
    "use_qk_norm": False,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
MOE = {
    "ffn_type": "moe",
    "n_routed_experts": 6,
    "n_activated_experts": 2,
    "dim_ffn_expert": 20,
}
BIASES = {"attention_bias": True, "attention_output_bias": True}
# architectures that no folder of a family has as it stands, and the family that fits them
OURS = {
    "default": ("qwen3", {}),
    "interleaved": ("qwen3", {"rope_interleaved": True}),
    "heads do not divide": ("mistral", {"n_heads": 3, "head_dim": 8, "use_qk_norm": False}),
    "latent, dense": ("deepseek_v2", {**MLA, "q_lora_rank": 12}),
    "latent, neighbours to halves": (
        "deepseek_v2",
        {**MLA, **MOE, **BIASES, "n_shared_experts": 1},
    ),
    "sigmoid without a bias": (
        "deepseek_v3",
        {**MLA, **MOE, "moe_scoring": "sigmoid", "first_k_dense": 1, "norm_topk_prob": True},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def make(**fields) -> Transformer:
    """A random model of ours, whose norms and biases show where they stand."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 300,
        "dim": 32,
        "n_layers": 2,
        "dim_ffn": 48,
        "n_heads": 4,
        "max_len": 64,
    }
    model = Transformer(ModelConfig.from_dict({**shape, **fields})).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            is_weight = tensor.dim() > 1
            tensor.mul_(4) if is_weight else tensor.copy_(torch.rand_like(tensor) + 0.5)
            if "correction" in name:
                tensor.zero_()
    return model


def load(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not [name for name in info["missing_keys"] if model.get_parameter(name).numel()]
    return model.eval()


def assert_equal(ours, theirs):
    ids = torch.randint(300, (2, 40))
    with torch.no_grad():
        expected, actual = ours(ids)["logits"], theirs(ids)["logits"]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_folder_of_ours_becomes_one_of_its_family(family, tmp_path, monkeypatch):
    monkeypatch.setattr(family.ours, "origin", None)  # as if it were ours from the start
    AutoModel.save_pretrained(family.ours, tmp_path / "ours")
    export_huggingface(tmp_path / "ours", tmp_path / "out", None)
    theirs = load(tmp_path / "out")
    # without a window Mistral is a Llama
    is_llama = family.name == "mistral"
    wanted = transformers.LlamaForCausalLM if is_llama else type(family.theirs)
    assert type(theirs) is wanted
    assert_equal(family.ours, theirs)


# transformers draws the weights of shared experts even where there are none
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", OURS)
def test_what_no_family_calls_so_may_still_fit_one(name, tmp_path):
    expected, fields = OURS[name]
    ours = make(**fields)
    AutoModel.save_pretrained(ours, tmp_path / "ours")
    export_huggingface(tmp_path / "ours", tmp_path / "out", None)
    theirs = load(tmp_path / "out")
    assert theirs.config.model_type == expected
    assert_equal(ours, theirs)
    assert_equal(ours, AutoModel.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_gated_attention": True}, "qwen3, cannot say use_gated_attention True"),
        ({"ffn_bias": True}, "llama, cannot say use_qk_norm True"),
        ({**MLA, "latent_norm_eps": 1e-5}, "latent_norm_eps 1e-05"),
        ({**MOE, "n_shared_experts": 1}, "qwen3_moe, cannot say n_shared_experts 1"),
        ({"attention_bias": True, "use_qk_norm": False, "sliding_window": 8, "ffn_bias": True},
         "qwen2, cannot say ffn_bias True"),
    ],
)  # fmt: skip
def test_what_fits_no_family_is_refused_by_its_fields(fields, named):
    with pytest.raises(ValueError, match=named):
        choose_family(make(**fields).config)


def test_tokenizer_and_chats_are_the_same(tmp_path, tokenizer):
    AutoModel.save_pretrained(make(), tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    export_huggingface(tmp_path / "ours", tmp_path / "out", None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "你好，世界！ It's 12 + 30 = 42.\n\n😀"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    messages = [{"role": "system", "content": "简短"}, {"role": "user", "content": text}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.render_chat(messages)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == sorted(tokenizer.stop_ids)
    assert config["bos_token_id"] is None
    assert load(tmp_path / "out").generation_config.eos_token_id == sorted(tokenizer.stop_ids)


def test_a_family_s_folder_is_copied(tmp_path, make_family, tokenizer):
    make_family("qwen2 tied", tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    (tmp_path / "in/LICENSE").write_text("as you like")
    export_huggingface(tmp_path / "in", tmp_path / "out", None)
    for path in (tmp_path / "in").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_shards_in_another_type_keep_the_balancing_bias(tmp_path, make_family):
    theirs = make_family("deepseek_v3 query latent, groups, bias, halves", tmp_path / "in")
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    (tmp_path / "in/model.safetensors").unlink(missing_ok=True)
    export_huggingface(tmp_path / "in", tmp_path / "out", "bfloat16")
    back = load(tmp_path / "out")
    assert back.dtype == torch.bfloat16
    for name, tensor in theirs.state_dict().items():
        wanted = tensor if "correction_bias" in name else tensor.bfloat16()
        assert torch.equal(back.state_dict()[name], wanted), name
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    sizes = [t.numel() * t.element_size() for t in back.state_dict().values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_older_readers_find_the_keys_they_know(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_len": 16}
    AutoModel.save_pretrained(make(rope_scaling=scaling, rope_theta=5e5), tmp_path / "ours")
    export_huggingface(tmp_path / "ours", tmp_path / "out", "float16")
    config = json.loads((tmp_path / "out/config.json").read_text())
    rule = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == config["rope_parameters"] == {**rule, "rope_theta": 5e5}
    assert config["dtype"] == config["torch_dtype"] == "float16"


def test_the_place_must_be_free(tmp_path):
    AutoModel.save_pretrained(make(), tmp_path / "ours")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/important.txt").write_text("keep")
    for out, named in (("ours", "must lie apart"), ("ours/out", "must lie apart"), (".", "apart"),
                       ("notes", "other files in it")):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            export_huggingface(tmp_path / "ours", tmp_path / out, None)
    assert (tmp_path / "notes/important.txt").read_text() == "keep"


def test_every_field_is_compared():
    """A new field of the architecture cannot be forgotten: it is in what is compared."""
    _, translated = choose_family(ModelConfig())
    assert translated["model_type"] == "qwen3"
    changed = dataclasses.replace(ModelConfig(), use_gated_attention=True)
    with pytest.raises(ValueError, match="no Hugging Face family fits"):
        choose_family(changed)


def test_an_exported_folder_is_exported_again_as_a_copy(tmp_path, tokenizer):
    AutoModel.save_pretrained(make(), tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    export_huggingface(tmp_path / "ours", tmp_path / "first", None)
    said = export_huggingface(tmp_path / "first", tmp_path / "second", None)
    assert "a copy of the qwen3 folder" in said
    again = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert again.fingerprint == tokenizer.fingerprint
