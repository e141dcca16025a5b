"""Adapters on the one forward: what they compute, where they sit, and how they go away."""

import copy

import pytest
import torch
import torch.nn.functional as F

from astrai_core.model import ModelConfig, Transformer
from astrai_core.model.layers import Linear
from astrai_core.model.lora import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    lora_disabled,
    lora_layers,
    merge_lora,
)
from astrai_core.model.quantization import quantize_

SHAPE = {"vocab_size": 50, "dim": 16, "n_layers": 2, "dim_ffn": 24, "n_heads": 4, "max_len": 32}
LATENT = {
    "attn_type": "mla",
    "use_qk_norm": False,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}
EXPERTS = {"ffn_type": "moe", "n_routed_experts": 4, "n_activated_experts": 2, "dim_ffn_expert": 8}
IDS = torch.arange(20).view(2, 10)


def make(config: LoRAConfig | None = None, **changes) -> Transformer:
    """A model with adapters that are no longer zero."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SHAPE, **changes})).eval()
    if config is not None:
        add_lora(model, config)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def test_a_layer_is_its_base_and_a_small_product():
    base = Linear(6, 5, bias=True)
    assert base.bias is not None
    layer = LoRALinear(base, LoRAConfig(rank=2, alpha=3))
    x = torch.randn(7, 6)
    assert torch.equal(layer(x), base(x))
    torch.nn.init.normal_(layer.lora_B)
    by_hand = x @ base.weight.T + base.bias + 1.5 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), by_hand)
    torch.testing.assert_close(F.linear(x, layer.weight, base.bias), by_hand)


def test_rslora_divides_by_the_root_of_the_rank():
    assert LoRAConfig(rank=16, alpha=8, rslora=True).scale == 2.0
    assert LoRAConfig(rank=16, alpha=8).scale == 0.5


def test_dropout_is_for_training_and_spares_the_base():
    layer = LoRALinear(Linear(400, 3), LoRAConfig(rank=1, alpha=1, dropout=0.25))
    torch.nn.init.ones_(layer.lora_A)
    torch.nn.init.ones_(layer.lora_B)
    x = torch.ones(1, 400)
    whole = layer.eval()(x) - layer.base(x)
    torch.testing.assert_close(whole, torch.full((1, 3), 400.0))
    kept = ((layer.train()(x) - layer.base(x)) * 0.75).round()  # kept ones are 1 / 0.75 each
    assert 250 < kept[0, 0] < 350
    assert (kept == kept[0, 0]).all()


@pytest.mark.parametrize("changes", [{}, LATENT, EXPERTS], ids=["gqa", "mla", "moe"])
def test_merging_changes_no_logits(changes):
    model = make(LoRAConfig(rank=3), **changes)
    before = model(IDS)["logits"]
    assert (before - make(**changes)(IDS)["logits"]).abs().max() > 1e-3
    merge_lora(model)
    assert not lora_layers(model)
    assert model.state_dict().keys() == make(**changes).state_dict().keys()
    torch.testing.assert_close(model(IDS)["logits"], before, atol=1e-5, rtol=1e-5)


def test_the_latent_form_and_the_built_out_heads_agree():
    """Decoding multiplies by the matrix of kv_b_proj itself, training calls the layer."""
    model = make(LoRAConfig(targets=["kv_b_proj"]), **LATENT)
    latent = model.eval()(IDS)["logits"]
    torch.testing.assert_close(model.train()(IDS)["logits"], latent, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, LATENT, EXPERTS], ids=["gqa", "mla", "moe"])
def test_disabled_is_the_base_bit_for_bit(changes):
    model, base = make(LoRAConfig(), **changes), make(**changes)
    adapted = model(IDS)["logits"]
    with lora_disabled(model):
        assert torch.equal(model(IDS)["logits"], base(IDS)["logits"])
    assert torch.equal(model(IDS)["logits"], adapted)


def test_only_adapters_get_gradients():
    model = make(LoRAConfig()).train()
    model(IDS)["logits"].square().mean().backward()
    for name, parameter in model.named_parameters():
        is_adapter = name.endswith(("lora_A", "lora_B"))
        assert parameter.requires_grad == is_adapter
        assert (parameter.grad is not None and bool(parameter.grad.any())) == is_adapter


def test_all_linear_leaves_out_head_router_and_routed_experts():
    model = make(LoRAConfig(), **EXPERTS, n_shared_experts=1, tie_weight=False)
    of_block = {name.removeprefix("layers.0.") for name in lora_layers(model) if ".0." in name}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    shared = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    assert of_block == attention | shared
    assert "lm_head" not in lora_layers(model)


def test_targets_are_names_or_their_ends():
    model = make(LoRAConfig(targets=["q_proj", "layers.1.mlp.up_proj"]))
    assert list(lora_layers(model)) == [
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
    ]


def test_experts_named_by_hand_are_adapted():
    model = make(LoRAConfig(targets=["down_proj"]), **EXPERTS)
    assert "layers.1.mlp.experts.3.down_proj" in lora_layers(model)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 0}, "lora.rank must be 1 or more, not 0"),
        ({"alpha": 0}, "lora.alpha must be above 0"),
        ({"dropout": 1.0}, "lora.dropout must be from 0"),
        ({"targets": "q_proj"}, "must be all-linear or a list"),
        ({"targets": []}, "must be all-linear or a list"),
        ({"targets": ["q_proj", "c_attn"]}, "no linear layer 'c_attn'; it has down_proj, gate_"),
        ({"targets": ["embed_tokens"]}, "no linear layer 'embed_tokens'"),
        ({"targets": ["lm_head"], "dropout": 0.1}, "lm_head cannot have dropout"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        add_lora(make(tie_weight=False), LoRAConfig(**options))


def test_adapters_on_adapters_are_refused():
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(make(LoRAConfig()), LoRAConfig())


def test_a_base_in_bfloat16_keeps_float32_adapters():
    model = make().bfloat16()
    add_lora(model, LoRAConfig())
    assert {layer.lora_A.dtype for layer in lora_layers(model).values()} == {torch.float32}
    logits = model(IDS)["logits"]
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, make().bfloat16()(IDS)["logits"])


def test_quantising_reaches_the_base_alone():
    model = make(LoRAConfig())
    adapters = copy.deepcopy({n: layer.lora_B for n, layer in lora_layers(model).items()})
    before = model(IDS)["logits"]
    quantize_(model)
    assert not any(isinstance(layer.base, Linear) for layer in lora_layers(model).values())
    assert all(torch.equal(layer.lora_B, adapters[n]) for n, layer in lora_layers(model).items())
    after = model(IDS)["logits"]
    assert 0 < (after - before).norm() / before.norm() < 0.05
    with pytest.raises(TypeError, match="merge adapters before quantising"):
        merge_lora(model)
