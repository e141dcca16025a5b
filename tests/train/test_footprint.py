import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from astrai_core.model import ModelConfig, PackedAttention, Transformer
from astrai_core.model.lora import LoRAConfig
from astrai_train.footprint import (
    Footprint,
    activated_parameters,
    activation_bytes,
    adapter_parameters,
    parameters_by_part,
    shallower,
)
from astrai_train.optim import OptimizerConfig, build_optimizer

SMALL = ModelConfig(
    vocab_size=100, dim=32, n_layers=3, dim_ffn=48, n_heads=4, n_kv_heads=2, tie_weight=False
)
MOE = dataclasses.replace(
    SMALL, ffn_type="moe", n_routed_experts=6, n_activated_experts=2, n_shared_experts=1,
    dim_ffn_expert=20, first_k_dense=1, sliding_window=8, sliding_window_layers=(1, 2),
)  # fmt: skip


def test_parameters_by_hand():
    attention = 32 * (32 + 16 + 16 + 32) + 8 + 8
    assert parameters_by_part(SMALL) == {
        "embedding": 3200,
        "output layer": 3200,
        "attention": 3 * attention,
        "feed-forward": 3 * 3 * 32 * 48,
        "norms": 3 * 2 * 32 + 32,
    }


def test_parameters_of_experts_by_hand():
    expert, shared, router = 3 * 32 * 20, 3 * 32 * 20, 6 * 32
    dense = 3 * 32 * 48
    assert parameters_by_part(MOE)["feed-forward"] == dense + 2 * (6 * expert + shared + router)
    others = sum(parameters_by_part(SMALL).values()) - 3 * dense
    assert activated_parameters(MOE) == others + dense + 2 * (2 * expert + shared + router)
    assert activated_parameters(SMALL) == sum(parameters_by_part(SMALL).values())


def test_a_shallower_model_keeps_its_proportions():
    half = shallower(dataclasses.replace(MOE, n_layers=8, first_k_dense=2), 4)
    assert (half.n_layers, half.first_k_dense, half.sliding_window_layers) == (4, 1, (1, 2))
    one = shallower(MOE, 1)
    assert (one.first_k_dense, one.sliding_window, one.sliding_window_layers) == (0, None, None)


@pytest.mark.parametrize("config", [SMALL, MOE], ids=["dense", "experts"])
def test_activations_are_what_a_real_forward_keeps(config):
    """All three layers are run here, on real tensors."""
    model = Transformer(config)
    kept: dict[StorageWeakRef, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[StorageWeakRef(tensor.untyped_storage())] = tensor
        return tensor

    ids = torch.zeros(2, 20, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden_states(ids, ids, PackedAttention.of_documents(ids))
    weights = {StorageWeakRef(weight.untyped_storage()) for weight in model.parameters()}
    real = sum(t.untyped_storage().nbytes() for s, t in kept.items() if s not in weights)
    assert activation_bytes(config, 2, 20) == real


def test_activations_grow_with_the_batch_and_weights_do_not():
    one, two = Footprint.of(SMALL, 1, 64), Footprint.of(SMALL, 2, 64)
    assert one.weights == two.weights == 4 * sum(parameters_by_part(SMALL).values())
    assert 1.9 < two.activations / one.activations < 2.1
    assert one.total == sum(dataclasses.astuple(one))


def test_adapters_are_all_that_has_gradients_and_moments():
    attention = 2 * (32 + 32) + 2 * (32 + 16)  # in + out of q, o and of k, v
    numbers = 3 * 4 * (attention + 3 * (32 + 48))
    lora = LoRAConfig(rank=4)
    assert adapter_parameters(SMALL, lora) == numbers
    whole, adapted = Footprint.of(SMALL, 2, 8), Footprint.of(SMALL, 2, 8, lora)
    assert adapted.weights == whole.weights + 4 * numbers
    assert (adapted.gradients, adapted.optimizer) == (4 * numbers, 8 * numbers)
    assert adapted.loss == 4 * 100 * 16
    assert adapted.total < whole.total


def test_adapters_of_one_layer_are_planned_too():
    lora = LoRAConfig(rank=4, targets=["layers.2.self_attn.q_proj"])
    assert adapter_parameters(SMALL, lora) == 4 * (32 + 32)
    assert Footprint.of(SMALL, 2, 8, lora).optimizer == 8 * 4 * (32 + 32)
    with pytest.raises(ValueError, match="no linear layer 'c_attn'"):
        adapter_parameters(SMALL, LoRAConfig(targets=["c_attn"]))


def test_adapters_around_experts_are_refused_by_name():
    with pytest.raises(ValueError, match=r"lora\.targets names layers of experts"):
        activation_bytes(MOE, 1, 8, LoRAConfig(targets=["down_proj"]))


def test_muon_keeps_one_number_for_a_matrix_and_adamw_two():
    model, muon = Transformer(SMALL), OptimizerConfig(name="muon")
    optimizer = build_optimizer(model, muon)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]
    assert Footprint.of(SMALL, 1, 8, optimizer=muon).optimizer == 4 * sum(v.numel() for v in kept)


def test_bfloat16_keeps_less_of_a_long_batch():
    mixed = Footprint.of(SMALL, 8, 64, is_mixed=True)
    whole = Footprint.of(SMALL, 8, 64)
    assert 0.4 < mixed.activations / whole.activations < 0.95
    assert (mixed.weights, mixed.optimizer) == (whole.weights, whole.optimizer)
