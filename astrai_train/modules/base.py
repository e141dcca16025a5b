"""What every objective shares: the model, the optimizer, and one rule for averaging.

The rule: a step's gradient is the sum over all tokens of the accumulation window, on all ranks,
divided by their number. Lightning would average micro-batches and ranks instead, which weighs a
token by how full its micro-batch happens to be. So `training_step` returns a sum, and the
gradients are divided once, when the count of the whole window is known.
"""

import logging
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from astrai_core.compilation import missing_compiler, use_private_cache
from astrai_core.model import AutoModel, ModelConfig, PackedAttention, Transformer
from astrai_core.model.moe import Routing
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.expert_balance import BalanceConfig, ExpertBalance, RowLoads, count_loads
from astrai_train.losses import IGNORED
from astrai_train.metrics import TokenLikelihood
from astrai_train.optim import OptimizerConfig, build_optimizer
from astrai_train.schedules import ScheduleConfig, count_steps

_log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
"""`input_ids`, `labels` (shifted already; -100 is not trained), `position_ids` and `document_ids`
(-1 is padding), each (B, T) int64."""

# Sums of thousands of losses would overflow float16 gradients; a power of two rounds nothing.
_SCALE = 2.0**-12


class LMModule(L.LightningModule, ABC):
    """Trains a `Transformer`; a subclass says what the loss of a batch is.

    Args:
        model: Shape of a new model with random weights. Give this or init_from.
        init_from: Folder of a model to start from, ours or one of a known Hugging Face family.
        optimizer: What turns gradients into updates.
        schedule: How the learning rate rises and falls.
        moe: How a model with experts keeps them evenly loaded.
        compile: Whether the forward pass is compiled, which takes a minute at the first start;
            auto compiles where a C++ compiler is present and says so.
    """

    def __init__(
        self,
        model: ModelConfig | None = None,
        init_from: Path | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
        moe: BalanceConfig = BalanceConfig(),
        compile: bool | Literal["auto"] = "auto",  # noqa: A002 - the option's name
    ) -> None:
        super().__init__()
        self.model = _build(model, init_from)
        self.tokenizer: AutoTokenizer | None = None
        """The datamodule's, from `setup` on."""
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.likelihood = TokenLikelihood()
        self._compile = compile
        self._balance = ExpertBalance(self.model, moe)
        self._run = partial(_run, self.model, moe.aux_loss_weight > 0)
        self._compiled = self._run
        self._byte_lengths: Tensor | None = None
        self._last_logged_step = 0
        self._learning_rate = 0.0
        self._grad_norm: Tensor | None = None
        self._expert_loads: dict[str, Tensor] = {}
        self._window_count = torch.zeros((), dtype=torch.int64)
        self._interval = _empty_interval()

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of a batch's losses, with its gradient, and how many were summed."""

    def hidden_states(self, batch: Batch) -> Tensor:
        """Run the model over a batch, to (B, T, dim)."""
        # validation stays eager: a second graph would cost more than it saves
        run = self._compiled if self.training else self._run
        hidden, loads = run(batch["input_ids"], batch["position_ids"], batch["document_ids"])
        if loads is not None and self.training:
            self._balance.observe(loads, (batch["labels"] != IGNORED).sum(1))
        return hidden

    def setup(self, stage: str) -> None:
        """Take the tokenizer from the datamodule and prepare the compiled forward."""
        tokenizer = getattr(self._datamodule, "tokenizer", None)
        rows = self.model.config.vocab_size
        if tokenizer is not None and tokenizer.vocab_size > rows:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocab_size is "
                f"{rows}: set model.vocab_size to {tokenizer.vocab_size}, or use the tokenizer "
                "that belongs to the model"
            )
        self.tokenizer = tokenizer
        if tokenizer is not None:
            self._byte_lengths = torch.tensor(tokenizer.token_byte_lengths, device=self.device)
        if stage == "fit":
            self._compiled = self._make_compiled()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the scaled loss sum of a micro-batch; see the module's docstring."""
        del batch_idx
        total, count = self.loss(batch)
        self._window_count = self._window_count.to(count.device) + count
        nats, tokens = self._interval
        self._interval = (
            nats.to(total.device) + total.detach().double(),
            tokens.to(count.device) + count,
        )
        total = total + self._balance.auxiliary_loss(count)
        return total * (_SCALE * self.trainer.accumulate_grad_batches)

    def on_train_start(self) -> None:
        """Begin a window: gradients of an unfinished one were never saved."""
        self._window_count = torch.zeros((), dtype=torch.int64)
        self._balance.begin_window()
        self._last_logged_step = self.trainer.global_step

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the window's gradients by its tokens on all ranks."""
        count = self._sum_over_ranks(self._window_count)
        # the strategy has averaged the ranks' gradients, so their number is multiplied back
        factor = self.trainer.world_size / (_SCALE * count.clamp(min=1).double())
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
        self._window_count = torch.zeros_like(self._window_count)
        self._expert_loads = self._balance.end_window(self._sum_over_ranks)
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer's options say, and keep the norm for the log."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            # ourselves: Lightning refuses fused optimizers under mixed precision, for a reason
            # that concerns float16 alone
            self._grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the interval that a step may have closed."""
        del outputs, batch, batch_idx
        step = self.trainer.global_step
        if step == self._last_logged_step or step % log_interval(self.trainer):
            return
        self._last_logged_step = step
        nats, tokens = (self._sum_over_ranks(value) for value in self._interval)
        self._interval = _empty_interval()
        self.log("train/loss", nats / tokens.clamp(min=1), prog_bar=True)
        self.log("lr", self._learning_rate)
        if self._grad_norm is not None:
            self.log("train/grad_norm", self._grad_norm)
        for name, value in self._expert_loads.items():
            self.log(name, value.float())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums of the validation."""
        del batch_idx
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Report the validation."""
        self._report("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums of the test."""
        del batch_idx
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Report the test."""
        self._report("test")

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the schedule, which moves with each optimizer step."""
        optimizer = build_optimizer(
            self.model, self.optimizer_config, fused=self.trainer.precision != "16-mixed"
        )
        factor = self.schedule_config.factor(self._total_steps())
        scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the open logging interval, so that a resumed run draws the same curve."""
        checkpoint["logging_interval"] = list(self._interval)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the logging interval."""
        nats, tokens = checkpoint.get("logging_interval", _empty_interval())
        self._interval = (nats, tokens)

    @property
    def _datamodule(self) -> object:
        return getattr(self.trainer, "datamodule", None)

    def _make_compiled(self) -> partial[tuple[Tensor, RowLoads | None]]:
        """Compile a function beside the model, so that the weights keep their names."""
        missing = missing_compiler()
        if self._compile is True and missing:
            raise ValueError(f"compile is true, but this machine has {missing}; set compile: false")
        if self._compile is False or missing:
            self.print(f"training runs uncompiled: {missing or 'compile is false'}")
            return self._run
        use_private_cache()
        self.print("training runs compiled; the first step waits for the compiler")
        return partial(torch.compile(_run), *self._run.args)

    def _evaluate(self, batch: Batch) -> None:
        total, count = self.loss(batch)
        labels = batch["labels"]
        num_bytes = torch.zeros_like(count)
        if self._byte_lengths is not None:
            self._byte_lengths = self._byte_lengths.to(labels.device)
            num_bytes = self._byte_lengths[labels[labels != IGNORED]].sum()
        self.likelihood.update(total, count, num_bytes)

    def _report(self, split: str) -> None:
        for name, value in self.likelihood.compute().items():
            self.log(f"{split}/{name}", value.float(), prog_bar=True, sync_dist=True)
        self.likelihood.reset()

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        total = self.trainer.strategy.reduce(value.to(self.device, copy=True), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Not the trainer's own estimate: asking for that builds the loaders before a checkpoint's
        place in the data is restored, which is then lost.
        """
        if self.schedule_config.total_steps is not None:
            return self.schedule_config.total_steps
        trainer = self.trainer
        num_batches = getattr(self._datamodule, "num_train_batches", None)
        limit = trainer.limit_train_batches
        if num_batches is not None and limit is not None:
            limited = limit if isinstance(limit, int) else int(num_batches * limit)
            num_batches = min(num_batches, limited)
        total = count_steps(
            max_steps=trainer.max_steps,
            max_epochs=trainer.max_epochs,
            num_batches=num_batches,
            accumulate=trainer.accumulate_grad_batches,
        )
        if total is None:
            raise ValueError(
                "the schedule does not know where the run ends: set trainer.max_steps, "
                "trainer.max_epochs or schedule.total_steps"
            )
        if total <= self.schedule_config.warmup_steps:
            _log.warning(
                "the run of %d steps ends within schedule.warmup_steps %d",
                total,
                self.schedule_config.warmup_steps,
            )
        return total


def log_interval(trainer: L.Trainer) -> int:
    """Optimizer steps between two lines of the log."""
    # Lightning sets it from afar, where a type checker does not see it
    return trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]


def _build(config: ModelConfig | None, init_from: Path | None) -> Transformer:
    if config is not None and init_from is not None:
        raise ValueError(
            f"model and init_from {init_from} contradict each other: a folder has its own shape; "
            "set one of them to null"
        )
    if config is not None:
        return AutoModel.from_config(config)
    if init_from is None:
        raise ValueError("nothing to train: set model for a new model, or init_from to a folder")
    # float32 also where the folder is bfloat16, in which small updates would round to nothing
    return AutoModel.from_pretrained(init_from, torch.float32).train()


def _run(
    model: Transformer,
    has_aux_loss: bool,
    input_ids: Tensor,
    position_ids: Tensor,
    document_ids: Tensor,
) -> tuple[Tensor, RowLoads | None]:
    """The forward pass as the compiler sees it: a model and tensors."""
    attention = PackedAttention.of_documents(document_ids)
    routings: list[Routing] = []
    hidden = model.hidden_states(input_ids, position_ids, attention, routings)
    # what is not learned from is not balanced either
    learned = routings if torch.is_grad_enabled() else []
    return hidden, count_loads(learned, document_ids, with_loss=has_aux_loss)


def _empty_interval() -> tuple[Tensor, Tensor]:
    """Nats and tokens since the last line of the log."""
    return torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
