"""Folders written by transformers load in place with equal logits, and go back."""

import pytest
import torch

from astrai_core.model import AutoModel, PackedAttention

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama head_dim": ("Llama", {"head_dim": 20, "rope_theta": 5e5, "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rope_theta": 1e6}),
}


def make(family: str, folder, **extra):
    """A random model of the family, with norms away from one so that their order shows."""
    name, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes, **extra})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_equal(family, tmp_path):
    theirs = make(family, tmp_path)
    ours = AutoModel.from_pretrained(tmp_path)
    ids = torch.randint(99, (2, 11))
    their_logits, our_logits = theirs(ids).logits, ours(ids)["logits"]
    torch.testing.assert_close(our_logits, their_logits, atol=1e-5, rtol=1e-5)
    their_logits.square().mean().backward()
    our_logits.square().mean().backward()
    for name, theirs_own in theirs.model.named_parameters():
        torch.testing.assert_close(
            ours.get_parameter(name).grad, theirs_own.grad, atol=1e-5, rtol=1e-4, msg=name
        )


@pytest.mark.parametrize("family", ["llama tied", "qwen3"])
def test_packed_documents_equal_each_document_alone(family, tmp_path):
    theirs, ours = make(family, tmp_path), AutoModel.from_pretrained(tmp_path)
    first, second = torch.randint(99, (1, 4)), torch.randint(99, (1, 6))
    documents = torch.tensor([[0] * 4 + [1] * 6 + [-1] * 2])
    ids = torch.cat((first, second, torch.zeros(1, 2, dtype=torch.int64)), dim=1)
    positions = torch.tensor([[*range(4), *range(6), 0, 0]])
    packed = ours(ids, positions, PackedAttention.of_documents(documents))["logits"]
    assert packed.isfinite().all()
    alone = torch.cat((theirs(first).logits, theirs(second).logits), dim=1)
    torch.testing.assert_close(packed[:, :10], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_stays_of_its_family(family, tmp_path):
    theirs = make(family, tmp_path / "theirs")
    AutoModel.save_pretrained(AutoModel.from_pretrained(tmp_path / "theirs"), tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(theirs)
    ids = torch.randint(99, (1, 9))
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, atol=0, rtol=0)


def test_shards_and_bfloat16_load(tmp_path):
    theirs = make("qwen3", tmp_path).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = AutoModel.from_pretrained(tmp_path)
    assert ours.norm.weight.dtype == torch.bfloat16
    whole = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    # loaded anew: a model cast to bfloat16 and back has rounded rotary frequencies
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(99, (1, 9))
    torch.testing.assert_close(whole(ids)["logits"], theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ({"mystery": 3}, "mystery"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(changes, named, tmp_path):
    make("llama tied", tmp_path, **changes)
    with pytest.raises(ValueError, match=named):
        AutoModel.from_pretrained(tmp_path)


def test_a_folder_loaded_in_float32_says_so_when_it_is_saved(tmp_path):
    """transformers takes the type of the weights from config.json, not from the weights."""
    make("qwen3", tmp_path / "theirs").bfloat16().save_pretrained(tmp_path / "theirs")
    ours = AutoModel.from_pretrained(tmp_path / "theirs", torch.float32)
    with torch.no_grad():
        ours.norm.weight.add_(1e-4)  # a step too small for bfloat16
    AutoModel.save_pretrained(ours, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.dtype == torch.float32
    assert torch.equal(back.model.norm.weight, ours.norm.weight)


def test_an_unknown_family_is_refused_by_name(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'gpt2' is not supported; known are astrai"):
        AutoModel.from_pretrained(tmp_path)
