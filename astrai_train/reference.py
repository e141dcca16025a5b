"""The model that a policy is held against.

With LoRA it is the same model without its adapters; otherwise a frozen copy, which is kept apart
from the module: not trained, not moved, and saved only once it is no longer the first model.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from astrai_core.model import PackedAttention, Transformer
from astrai_core.model.lora import lora_disabled, lora_layers


class Reference:
    """Scores batches as the model would have before training, or when it was last synced.

    Args:
        model: the model that is about to be trained.
    """

    def __init__(self, model: Transformer) -> None:
        self._policy = model
        self._has_lora = bool(lora_layers(model))
        self._copy = None
        if not self._has_lora:
            self._copy = copy.deepcopy(model).requires_grad_(False).eval()

    @property
    def can_sync(self) -> bool:
        """Whether it can become another model: one without LoRA is always the same."""
        return self._copy is not None

    @torch.no_grad()
    def score(
        self,
        batch: dict[str, Tensor],
        score: Callable[[Transformer, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Run a batch and score its labels.

        Args:
            batch: as of `LMModule`.
            score: given the model, hidden states (B, T, dim) and labels (B, T).
        """
        if self._copy is None:
            with lora_disabled(self._policy):
                return score(self._policy, _run(self._policy, batch), batch["labels"])
        model = self._copy.to(batch["labels"].device)
        return score(model, _run(model, batch), batch["labels"])

    def sync(self) -> None:
        """Become what the policy is now."""
        assert self._copy is not None
        self._copy.load_state_dict(self._policy.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The copy's weights."""
        assert self._copy is not None
        return dict(self._copy.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be what was saved."""
        assert self._copy is not None
        self._copy.load_state_dict(state)


def _run(model: Transformer, batch: dict[str, Tensor]) -> Tensor:
    attention = PackedAttention.of_documents(batch["document_ids"])
    return model.hidden_states(batch["input_ids"], batch["position_ids"], attention)
