"""How fast a run trains."""

import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from astrai_train.modules.base import log_interval
from astrai_train.modules.grpo import GRPOModule


class Throughput(Callback):
    """Logs `train/tokens_per_s` of each logging interval, over all ranks.

    Tokens are those that the model reads, padding excluded, whether they are trained or not; of
    rollouts those that training reads, while answering counts in the time. The
    time is all of the interval's, checkpoints and samples included, but not validation.
    """

    def __init__(self) -> None:
        self._tokens = torch.zeros((), dtype=torch.int64)
        self._last_step = 0
        self._since = 0.0
        self._paused_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del pl_module
        self._last_step = trainer.global_step
        self._begin()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
    ) -> None:
        """Count the batch, and log where a step closes the interval."""
        del outputs, batch_idx
        if isinstance(pl_module, GRPOModule) and "prompts" in batch:
            tokens = torch.tensor(pl_module.tokens_read, device=pl_module.device)
        else:
            tokens = (batch["document_ids"] >= 0).sum()
        self._tokens = self._tokens.to(tokens.device) + tokens
        step = trainer.global_step
        if step == self._last_step or step % log_interval(trainer):
            return
        self._last_step = step
        tokens = trainer.strategy.reduce(self._tokens, reduce_op="sum")
        speed = tokens / (time.perf_counter() - self._since)
        pl_module.log("train/tokens_per_s", speed, prog_bar=True)
        self._begin()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        del trainer, pl_module
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock run on."""
        del trainer, pl_module
        self._since += time.perf_counter() - self._paused_at

    def _begin(self) -> None:
        self._tokens = torch.zeros_like(self._tokens)
        self._since = time.perf_counter()
