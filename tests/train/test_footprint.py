import dataclasses

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from astrai_core.model import ModelConfig, PackedAttention, Transformer
from astrai_train.footprint import Footprint, activation_bytes, parameters_by_part

SMALL = ModelConfig(
    vocab_size=100, dim=32, n_layers=3, dim_ffn=48, n_heads=4, n_kv_heads=2, tie_weight=False
)


def test_parameters_by_hand():
    attention = 32 * (32 + 16 + 16 + 32) + 8 + 8
    assert parameters_by_part(SMALL) == {
        "embedding": 3200,
        "output layer": 3200,
        "attention": 3 * attention,
        "feed-forward": 3 * 3 * 32 * 48,
        "norms": 3 * 2 * 32 + 32,
    }


def test_activations_are_what_a_real_forward_keeps():
    """All three layers are run here, on real tensors."""
    model = Transformer(SMALL)
    kept: dict[StorageWeakRef, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[StorageWeakRef(tensor.untyped_storage())] = tensor
        return tensor

    ids = torch.zeros(2, 20, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden_states(ids, ids, PackedAttention.of_documents(ids))
    weights = {StorageWeakRef(weight.untyped_storage()) for weight in model.parameters()}
    real = sum(t.untyped_storage().nbytes() for s, t in kept.items() if s not in weights)
    assert activation_bytes(SMALL, 2, 20) == real


def test_activations_grow_with_the_batch_and_weights_do_not():
    one, two = Footprint.of(SMALL, 1, 64), Footprint.of(SMALL, 2, 64)
    assert one.weights == two.weights == 4 * sum(parameters_by_part(SMALL).values())
    assert 1.9 < two.activations / one.activations < 2.1
    assert one.total == sum(dataclasses.astuple(one))
