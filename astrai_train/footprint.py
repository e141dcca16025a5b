"""What a model weighs in training, worked out without building it.

Activations are those of the uncompiled forward pass, which keeps most; compiling needs less.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from astrai_core.model import ModelConfig, PackedAttention, Transformer

_PARTS = {"embed_tokens": "embedding", "lm_head": "output layer", "self_attn": "attention"}
_PARTS |= {"mlp": "feed-forward"}
_FLOAT = 4


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """How many numbers each part of the model holds, those that are there."""
    counts: Counter[str] = Counter()
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config, n_layers=1))
    for name, parameter in model.named_parameters():
        known = [part for word in name.split(".") if (part := _PARTS.get(word))]
        times = config.n_layers if name.startswith("layers.") else 1
        counts[known[0] if known else "norms"] += parameter.numel() * times
    return dict(counts)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that training holds at its fullest moment, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    """Logits of a chunk, and the output layer's gradient before it is added to the others."""

    @classmethod
    def of(cls, config: ModelConfig, rows: int, length: int) -> "Footprint":
        """Work it out for AdamW in float32 and micro-batches of (rows, length) tokens."""
        weights = _FLOAT * sum(parameters_by_part(config).values())
        chunk = min(512, rows * length)
        return cls(
            weights=weights,
            gradients=weights,
            optimizer=2 * weights,
            activations=activation_bytes(config, rows, length),
            loss=_FLOAT * config.vocab_size * (2 * chunk + config.dim),
        )

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.asdict(self).values())


def activation_bytes(config: ModelConfig, rows: int, length: int) -> int:
    """Bytes that the forward pass keeps for the backward pass.

    Two small models tell it: all layers keep the same, and the vocabulary keeps nothing.
    """
    one, two = (
        _saved_bytes(dataclasses.replace(config, n_layers=n, vocab_size=1), rows, length)
        for n in (1, 2)
    )
    return one + (config.n_layers - 1) * (two - one)


def _saved_bytes(config: ModelConfig, rows: int, length: int) -> int:
    """Run a forward pass on tensors that have shapes but no memory."""
    saved: dict[StorageWeakRef, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # several operations may keep one tensor; kept alive, so that no address is used twice
        saved[StorageWeakRef(tensor.untyped_storage())] = tensor
        return tensor

    with FakeTensorMode():
        model = Transformer(config)
        ids = torch.zeros((rows, length), dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden_states(ids, ids, PackedAttention.of_documents(ids))
        weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
        return sum(
            tensor.untyped_storage().nbytes()
            for storage, tensor in saved.items()
            if storage not in weights
        )
