"""Adapters of PEFT and of ours are the same files, logits, gradients and merged weights."""

import json

import pytest
import torch

from astrai_core.model import AutoModel, Transformer
from astrai_core.model.adapter import adapt, attach_adapter
from astrai_core.model.lora import LoRAConfig, lora_layers, merge_lora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.parity,
    # of PEFT about transformers
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

IDS = torch.arange(22).view(2, 11) * 4
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "deepseek": (
        "DeepseekV3",
        {
            "kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
            "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
            "n_shared_experts": 1, "num_key_value_heads": 4,
        },
    ),
}  # fmt: skip

# PEFT turns names of feed-forward layers into those of transformers' fused experts, whose adapters
# are another form
TARGETS = {"deepseek": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}


def make_base(family, folder):
    """A random model of a family; returns the folder."""
    name, changes = FAMILIES[family]
    shape = {
        "vocab_size": 99,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**shape, **changes})
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    return folder


def make_theirs(base, folder, **options):
    """An adapter of PEFT's on a base, away from zero; saved into `folder`."""
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(**{**config, **options}),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


def make_ours(base, folder, **options) -> Transformer:
    """The same the other way round."""
    torch.manual_seed(2)
    model = AutoModel.from_pretrained(base)
    adapt(model, LoRAConfig(**{"rank": 4, "alpha": 12, **options}), base)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    AutoModel.save_pretrained(model, folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_reads_what_peft_writes_with_equal_logits_and_gradients(family, tmp_path):
    base = make_base(family, tmp_path / "base")
    targets = TARGETS.get(family, "all-linear")
    theirs = make_theirs(base, tmp_path / "adapter", target_modules=targets)
    ours = AutoModel.from_pretrained(tmp_path / "adapter")
    their_logits, our_logits = theirs(IDS).logits, ours(IDS)["logits"]
    assert (their_logits - AutoModel.from_pretrained(base)(IDS)["logits"]).abs().max() > 1e-2
    torch.testing.assert_close(our_logits, their_logits, atol=1e-5, rtol=1e-5)
    their_logits.square().mean().backward()
    our_logits.square().mean().backward()
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            layer, _, matrix = name.removesuffix(".default.weight").rpartition(".")
            own = getattr(ours.get_submodule(layer.removeprefix("base_model.model.model.")), matrix)
            torch.testing.assert_close(own.grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
            compared += 1
    assert compared == 2 * len(lora_layers(ours))


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_ours_writes_with_equal_logits(family, tmp_path):
    base = make_base(family, tmp_path / "base")
    ours = make_ours(base, tmp_path / "adapter", targets=TARGETS.get(family, "all-linear"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS)["logits"], atol=1e-5, rtol=1e-5)


def test_merged_weights_are_equal_and_stay_of_their_family(tmp_path):
    base = make_base("qwen3", tmp_path / "base")
    theirs = make_theirs(base, tmp_path / "adapter").merge_and_unload()
    ours = AutoModel.from_pretrained(tmp_path / "adapter")
    merge_lora(ours)
    for name, parameter in theirs.model.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)
    AutoModel.save_pretrained(ours, tmp_path / "merged")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(back(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_rslora_and_named_targets_go_both_ways(tmp_path):
    base = make_base("llama", tmp_path / "base")
    theirs = make_theirs(
        base, tmp_path / "theirs", use_rslora=True, target_modules=["q_proj", "down_proj"]
    )
    ours = AutoModel.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS)["logits"], theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    own = make_ours(base, tmp_path / "ours", rslora=True, targets=["v_proj", "up_proj"])
    back = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(back(IDS).logits, own(IDS)["logits"], atol=1e-5, rtol=1e-5)


def test_both_begin_with_the_same_distribution(tmp_path):
    """A uniform of the same width, B zero."""
    base = make_base("llama", tmp_path / "base")
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=64, target_modules=["down_proj"]),
    )
    ours = AutoModel.from_pretrained(base)
    adapt(ours, LoRAConfig(rank=64, targets=["down_proj"]), base)
    theirs = model.base_model.model.model.layers[0].mlp.down_proj
    own = lora_layers(ours)["layers.0.mlp.down_proj"]
    width = 80**-0.5
    for matrix in (theirs.lora_A["default"].weight, own.lora_A):
        assert 0.98 * width < matrix.abs().max() <= width
        torch.testing.assert_close(matrix.std().item(), width * 3**-0.5, atol=0, rtol=0.03)
    assert not theirs.lora_B["default"].weight.any()
    assert not own.lora_B.any()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.base_layer.weight is not"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(options, named, tmp_path):
    base = make_base("qwen3", tmp_path / "base")
    make_theirs(base, tmp_path / "adapter", **options)
    with pytest.raises(ValueError, match=named):
        AutoModel.from_pretrained(tmp_path / "adapter")


def test_an_adapter_of_fused_experts_is_refused_by_name(tmp_path):
    base = make_base("deepseek", tmp_path / "base")
    with pytest.warns(RuntimeWarning, match="_pattern keys did not match"):
        make_theirs(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"_pattern .*gate_up_proj.* is not supported"):
        AutoModel.from_pretrained(tmp_path / "adapter")


def test_another_kind_of_adapter_is_refused_by_name(tmp_path):
    base = make_base("qwen3", tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="peft_type 'IA3' is not supported"):
        AutoModel.from_pretrained(tmp_path / "adapter")


def test_an_adapter_of_another_shape_is_refused_by_name(tmp_path):
    make_ours(make_base("llama", tmp_path / "llama"), tmp_path / "adapter")
    other = AutoModel.from_pretrained(make_base("qwen3", tmp_path / "qwen3"))
    with pytest.raises(ValueError, match=r"does not fit .*q_proj.lora_B has shape"):
        attach_adapter(other, tmp_path / "adapter", tmp_path / "qwen3")
    deepseek = AutoModel.from_pretrained(make_base("deepseek", tmp_path / "deepseek"))
    with pytest.raises(ValueError, match=r"adapts layers.0.self_attn.k_proj, which the base"):
        attach_adapter(deepseek, tmp_path / "adapter", tmp_path / "deepseek")


def test_a_base_that_changed_is_noticed(tmp_path, caplog):
    base = make_base("llama", tmp_path / "base")
    make_ours(base, tmp_path / "adapter")
    changed = AutoModel.from_pretrained(base)
    with torch.no_grad():
        changed.norm.weight[0] += 1e-3
    AutoModel.save_pretrained(changed, base)
    with pytest.raises(ValueError, match="they have changed since"):
        AutoModel.from_pretrained(tmp_path / "adapter")
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="not a folder on this disk; pass the folder where"):
        AutoModel.from_pretrained(tmp_path / "adapter")
    attach_adapter(changed, tmp_path / "adapter", tmp_path / "moved")
    assert "are not those that" in caplog.text


def test_a_file_that_is_missing_or_lacks_a_matrix_is_named(tmp_path):
    base = make_base("llama", tmp_path / "base")
    make_ours(base, tmp_path / "adapter", targets=["q_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"r": 8}))
    with pytest.raises(ValueError, match=r"lora_A has shape \(4, 48\), the base asks \(8, 48\)"):
        AutoModel.from_pretrained(tmp_path / "adapter")
    config.write_text(json.dumps(content | {"mystery_scale": 2}))
    with pytest.raises(ValueError, match="mystery_scale 2 is not supported"):
        AutoModel.from_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        AutoModel.from_pretrained(tmp_path / "adapter")
