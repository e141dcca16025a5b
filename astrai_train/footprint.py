"""What a model weighs in training, worked out without building it.

Activations are those of the uncompiled forward pass, which keeps most; compiling needs less.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from astrai_core.model import ModelConfig, PackedAttention, Transformer
from astrai_core.model.adapter import adapter_state
from astrai_core.model.lora import LoRAConfig, add_lora
from astrai_train.losses.projection import block_rows
from astrai_train.optim import OptimizerConfig, muon_groups

_PARTS = {"embed_tokens": "embedding", "lm_head": "output layer", "self_attn": "attention"}
_PARTS |= {"mlp": "feed-forward"}
_FLOAT = 4


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """How many numbers each part of the model holds, those that are there."""
    counts: Counter[str] = Counter()
    dense = config.first_k_dense
    # one layer of each kind stands for all of it
    times = {"layers.0.": dense, "layers.1.": config.n_layers - dense}
    if not dense:
        times = {"layers.0.": config.n_layers}
    small = dataclasses.replace(shallower(config, len(times)), first_k_dense=len(times) - 1)
    with torch.device("meta"):
        model = Transformer(small)
    for name, parameter in model.named_parameters():
        known = [part for word in name.split(".") if (part := _PARTS.get(word))]
        counts[known[0] if known else "norms"] += parameter.numel() * times.get(name[:9], 1)
    return dict(counts)


def activated_parameters(config: ModelConfig) -> int:
    """How many numbers one token meets: all but the experts that are not chosen for it."""
    total = sum(parameters_by_part(config).values())
    if config.ffn_type == "mlp":
        return total
    passed_by = config.n_routed_experts - config.n_activated_experts
    expert = 3 * config.dim * config.dim_ffn_expert
    return total - (config.n_layers - config.first_k_dense) * passed_by * expert


def adapter_parameters(config: ModelConfig, lora: LoRAConfig) -> int:
    """How many numbers the adapters hold, which are all that is trained.

    Raises:
        ValueError: a target is no layer of the model.
    """
    with torch.device("meta"):
        model = Transformer(config)
        add_lora(model, lora)
    return sum(parameter.numel() for parameter in adapter_state(model).values())


def optimizer_numbers(
    config: ModelConfig, optimizer: OptimizerConfig, lora: LoRAConfig | None = None
) -> int:
    """How many numbers the optimizer keeps: two for each that AdamW moves, one where Muon does."""
    trained = adapter_parameters(config, lora) if lora else sum(parameters_by_part(config).values())
    if optimizer.name == "adamw":
        return 2 * trained
    with torch.device("meta"):
        model = Transformer(config)
        if lora is not None:
            add_lora(model, lora)
    alone = [group["params"] for group in muon_groups(model, optimizer) if group["orthogonal"]]
    return 2 * trained - sum(parameter.numel() for group in alone for parameter in group)


def of_any_depth(lora: LoRAConfig) -> LoRAConfig:
    """The same adapters by the last part of their names, which fewer layers have too."""
    if isinstance(lora.targets, str):
        return lora
    return dataclasses.replace(lora, targets=[name.rpartition(".")[2] for name in lora.targets])


def shallower(config: ModelConfig, n_layers: int) -> ModelConfig:
    """The same model with fewer layers, of each kind about as large a share."""
    windows = config.sliding_window_layers
    kept = None if windows is None else tuple(n for n in windows if n < n_layers)
    return dataclasses.replace(
        config,
        n_layers=n_layers,
        first_k_dense=config.first_k_dense * n_layers // config.n_layers,
        sliding_window=config.sliding_window if kept is None or kept else None,
        sliding_window_layers=kept or None,
    )


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that training holds at its fullest moment, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    """Slopes of a block of logits, and the output layer's gradient before it joins the others."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        rows: int,
        length: int,
        lora: LoRAConfig | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),
        *,
        is_mixed: bool = False,
    ) -> "Footprint":
        """Work it out for weights in float32 and micro-batches of (rows, length) tokens.

        `is_mixed` computes in bfloat16.
        """
        weights = trained = _FLOAT * sum(parameters_by_part(config).values())
        head_gradient = config.dim
        if lora is not None:
            trained = _FLOAT * adapter_parameters(config, lora)
            weights += trained
            head_gradient = 0
        block = min(block_rows(config.vocab_size, _FLOAT), rows * length)
        return cls(
            weights=weights,
            gradients=trained,
            optimizer=_FLOAT * optimizer_numbers(config, optimizer, lora),
            activations=activation_bytes(config, rows, length, lora, is_mixed=is_mixed),
            loss=_FLOAT * config.vocab_size * (block + head_gradient),
        )

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.asdict(self).values())


def activation_bytes(
    config: ModelConfig,
    rows: int,
    length: int,
    lora: LoRAConfig | None = None,
    *,
    is_mixed: bool = False,
) -> int:
    """Bytes that the forward pass keeps for the backward pass.

    Small models tell it: all layers of a kind keep the same, and the vocabulary keeps nothing.
    """
    small = dataclasses.replace(config, vocab_size=1, first_k_dense=0)
    lora = None if lora is None else of_any_depth(lora)
    one, two = (_saved_bytes(shallower(small, n), rows, length, lora, is_mixed) for n in (1, 2))
    saved = one + (config.n_layers - 1) * (two - one)
    if config.first_k_dense:
        mixed = dataclasses.replace(shallower(small, 2), first_k_dense=1)
        saved += config.first_k_dense * (_saved_bytes(mixed, rows, length, lora, is_mixed) - two)
    return saved


def _saved_bytes(
    config: ModelConfig, rows: int, length: int, lora: LoRAConfig | None, is_mixed: bool
) -> int:
    """Run a forward pass on tensors that have shapes but no memory."""
    saved: dict[StorageWeakRef, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # several operations may keep one tensor; kept alive, so that no address is used twice
        saved[StorageWeakRef(tensor.untyped_storage())] = tensor
        return tensor

    with FakeTensorMode():
        model = Transformer(config)
        if lora is not None:
            add_lora(model, lora)
        ids = torch.zeros((rows, length), dtype=torch.int64)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=is_mixed),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            try:
                model.hidden_states(ids, ids, PackedAttention.of_documents(ids))
            except DataDependentOutputException as error:
                raise ValueError(
                    "lora.targets names layers of experts, whose memory depends on the tokens "
                    "that each gets: such a run cannot be planned, though it can be trained"
                ) from error
        weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
        return sum(
            tensor.untyped_storage().nbytes()
            for storage, tensor in saved.items()
            if storage not in weights
        )
