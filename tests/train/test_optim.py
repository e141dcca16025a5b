import dataclasses

import pytest
import torch

from astrai_core.model import ModelConfig, Transformer
from astrai_train.muon import Muon
from astrai_train.optim import OptimizerConfig, build_optimizer, muon_groups, parameter_groups

SMALL = ModelConfig(
    vocab_size=20, dim=16, n_layers=1, dim_ffn=24, n_heads=2, attention_bias=True, tie_weight=False
)


def decayed_names(model: Transformer) -> set[str]:
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    return {names[id(parameter)] for parameter in decayed["params"]}


def test_only_matrices_are_decayed():
    attention = {f"layers.0.self_attn.{n}_proj.weight" for n in "qkvo"}
    mlp = {f"layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert decayed_names(Transformer(SMALL)) == attention | mlp | {"lm_head.weight"}


def test_frozen_weights_are_left_out():
    model = Transformer(SMALL)
    model.layers.requires_grad_(False)
    (decayed, free) = parameter_groups(model, 0.1)
    assert len(decayed["params"]) == 1  # lm_head
    assert len(free["params"]) == 2  # the embedding and the final norm


def test_the_first_step_is_adams_by_hand():
    """With both means corrected for their start, the first step is lr * sign(gradient)."""
    model = Transformer(SMALL)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) + 0.01
    build_optimizer(model, OptimizerConfig(lr=0.01, weight_decay=0.5)).step()
    for name, after in model.named_parameters():
        assert after.grad is not None
        kept = 1 - 0.01 * 0.5 if name.endswith("_proj.weight") or name[0:2] == "lm" else 1
        wanted = before[name] * kept - 0.01 * after.grad.sign()
        torch.testing.assert_close(after.detach(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tied", "output_lr"), [(False, {0.004, 0.03}), (True, {0.004})])
def test_muon_moves_the_matrices_of_the_blocks_only(tied, output_lr):
    model = Transformer(dataclasses.replace(SMALL, tie_weight=tied))
    config = OptimizerConfig(name="muon", lr=0.02, adamw_lr=0.004, embedding_lr=0.03)
    hidden, *others = muon_groups(model, config)
    ids = {id(p) for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    assert {id(parameter) for parameter in hidden["params"]} == ids
    assert {group["lr"] for group in others} == output_lr
    assert sum(len(group["params"]) for group in (hidden, *others)) == len([*model.parameters()])
    assert isinstance(build_optimizer(model, config), Muon)


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0.0},
        {"weight_decay": -1.0},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"momentum": 1.0},
        {"adamw_lr": 0},
        {"embedding_lr": -1},
    ],
)
def test_a_bad_field_is_refused_by_name(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
        OptimizerConfig(**fields)
