"""What every objective shares: the model, the optimizer, and one rule for averaging.

The rule: a step's gradient is the sum over all tokens of the accumulation window, on all ranks,
divided by their number. Lightning would average micro-batches and ranks instead, which weighs a
token by how full its micro-batch happens to be. So `training_step` returns a sum, and the
gradients are divided once, when the count of the whole window is known.

What an objective implements and may use:

    loss(batch) -> (sum, count)      the rule above; the count may weigh tokens, pairs or sequences
    hidden_states(batch)             the forward pass, compiled where that pays
    record(name, total, count)       another mean to report, callable from `loss` and from
                                     `evaluate`: logged as `train/name` at the log interval, or as
                                     `val/name` and `test/name` over the whole split
    evaluate(batch)                  what validation and test measure; the mean of `loss` unless
                                     overridden
    evaluation() -> {name: value}    more of what they report than means
    predict_step(batch, batch_idx)   one dict for each line that `astrai-train predict` writes
    rewind_window()                  forget what `loss` has changed since the last optimizer step,
                                     so that a checkpoint made now is that of the step

A batch may hold other keys than `Batch` names. `items` are the numbers of its items in the data
set, -1 where there was none left: by them a message says which data was bad.
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
from astrai_core.model.adapter import adapt, is_adapter_folder
from astrai_core.model.auto import read_config_json
from astrai_core.model.lora import LoRAConfig, merge_lora
from astrai_core.model.moe import Routing
from astrai_core.model.quantization import described_scheme
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.expert_balance import BalanceConfig, ExpertBalance, RowLoads, count_loads
from astrai_train.losses import IGNORED
from astrai_train.metrics import Sums
from astrai_train.optim import OptimizerConfig, build_optimizer
from astrai_train.schedules import ScheduleConfig, count_steps
from astrai_train.window import NonFiniteError, Window, of_rank, over_ranks

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
        lora: Small adapters to train over the frozen model of init_from, kept in PEFT's format;
            null trains all weights.
        optimizer: What turns gradients into updates.
        schedule: How the learning rate rises and falls.
        moe: How a model with experts keeps them evenly loaded.
        compile: Whether the forward pass is compiled, which takes a minute at the first start;
            auto compiles where a C++ compiler is present and says so.
        on_nonfinite: What to do when the loss or the gradient of an optimizer step is infinite or
            NaN: stop with a checkpoint of the step before and name the data, or skip the update
            and count it in `train/skipped_steps`.
    """

    is_ragged = False
    """Whether the number of rows and their length change from batch to batch."""

    def __init__(
        self,
        model: ModelConfig | None = None,
        init_from: Path | None = None,
        lora: LoRAConfig | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
        moe: BalanceConfig = BalanceConfig(),
        compile: bool | Literal["auto"] = "auto",  # noqa: A002 - the option's name
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        self.model = _build(model, init_from, lora)
        self.tokenizer: AutoTokenizer | None = None
        """The datamodule's, from `setup` on."""
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self._compile = compile
        self._balance = ExpertBalance(self.model, moe)
        self._run = partial(_run, self.model, moe.aux_loss_weight > 0)
        self._compiled = self._run
        self._on_nonfinite = on_nonfinite
        self._last_logged_step = 0
        self._learning_rate = 0.0
        self._grad_norm: Tensor | None = None
        self._expert_loads: dict[str, Tensor] = {}
        self._num_skipped = 0
        self._window = Window()
        self._interval = Sums()
        self._evaluated = Sums()

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of a batch's losses, with its gradient, and how many were summed."""

    def record(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Report the mean `total / count`, summed over batches and ranks before it is divided.

        Nothing waits for the device. A name with a slash, like `reward/exact`, is a group of its
        own in training, where others are put under `train/`; `val/` and `test/` go before both.
        """
        sums = self._window.sums if self.training else self._evaluated
        sums.add(name, total, count)

    def evaluate(self, batch: Batch) -> None:
        """Measure a batch of a validation or test."""
        self.record("loss", *self.loss(batch))

    def evaluation(self) -> dict[str, Tensor]:
        """Return what a validation or test reports beside the recorded means."""
        return {}

    def num_repeats(self, accumulate: int) -> int:
        """Return how often training wants each batch, one time after the other.

        Args:
            accumulate: micro-batches of an optimizer step.
        """
        del accumulate
        return 1

    def rewind_window(self) -> None:
        """Forget what `loss` has changed since the last optimizer step: here nothing."""

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
        if stage == "fit":
            self._compiled = self._make_compiled()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the scaled loss sum of a micro-batch; see the module's docstring."""
        del batch_idx
        total, count = self.loss(batch)
        self._window.add(total, count, batch.get("items"))
        total = total + self._balance.auxiliary_loss(count)
        return total * (_SCALE * self.trainer.accumulate_grad_batches)

    def on_train_start(self) -> None:
        """Begin a window: gradients of an unfinished one were never saved."""
        self._window = Window()
        self._balance.begin_window()
        self._last_logged_step = self.trainer.global_step

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the window's gradients by its tokens on all ranks, if all of it is finite."""
        loss, count = self._sum_over_ranks(torch.stack([self._window.loss, self._window.count]))
        # the strategy has averaged the ranks' gradients, so their number is multiplied back
        factor = self.trainer.world_size / (_SCALE * torch.where(count > 0, count, 1))
        gradients = [one.grad for one in self.parameters() if one.grad is not None]
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
        self._grad_norm = torch.nn.utils.get_total_norm(gradients)
        is_finite = loss.isfinite() & (self._grad_norm.isfinite() | self._has_scaler)
        window, self._window = self._window, Window()
        if not is_finite:  # the one moment of a step that waits for the device
            self._refuse(window)
            return
        self._interval.merge(window.sums)
        self._expert_loads = self._balance.end_window(self._sum_over_ranks)
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer's options say."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            # ourselves: Lightning refuses fused optimizers under mixed precision, for a reason
            # that concerns float16 alone
            assert self._grad_norm is not None
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters(), gradient_clip_val, self._grad_norm
            )
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the interval that a step may have closed."""
        del outputs, batch, batch_idx
        step = self.trainer.global_step
        if step == self._last_logged_step or step % log_interval(self.trainer):
            return
        self._last_logged_step = step
        for name, value in self._means(self._interval).items():
            is_loss = name == "loss"
            self.log(name if "/" in name else f"train/{name}", value, prog_bar=is_loss)
        self._interval = Sums()
        if self._num_skipped:
            self.log("train/skipped_steps", float(self._num_skipped))
        self.log("lr", self._learning_rate)
        if self._grad_norm is not None:
            self.log("train/grad_norm", self._grad_norm)
        for name, value in self._expert_loads.items():
            self.log(name, value.float())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums of the validation."""
        del batch_idx
        self.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Report the validation."""
        self._report("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums of the test."""
        del batch_idx
        self.evaluate(batch)

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
        checkpoint["logging_interval"] = over_ranks(self._interval.state())
        checkpoint["num_skipped"] = self._num_skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the logging interval."""
        self._interval = Sums()
        for states in of_rank(checkpoint.get("logging_interval", []), self.trainer):
            self._interval.merge(Sums(states))
        self._num_skipped = checkpoint.get("num_skipped", 0)

    @property
    def _datamodule(self) -> object:
        return getattr(self.trainer, "datamodule", None)

    def _make_compiled(self) -> partial[tuple[Tensor, RowLoads | None]]:
        """Compile a function beside the model, so that the weights keep their names."""
        missing = missing_compiler()
        if self._compile is True and missing:
            raise ValueError(
                f"compile is true, but this machine has {missing}; install g++ or set "
                "compile: false"
            )
        if self._compile is False or missing:
            lost = f"{missing}; install g++ for full speed" if missing else "compile is false"
            self.print(f"training runs uncompiled: {lost}")
            return self._run
        use_private_cache()
        self.print("training runs compiled; the first step waits for the compiler")
        # rows and lengths that vary would each be compiled anew until the compiler sees a pattern
        dynamic = True if self.is_ragged else None
        return partial(torch.compile(_run, dynamic=dynamic), *self._run.args)

    @property
    def _has_scaler(self) -> bool:
        """Whether steps with infinite gradients are dropped by float16's scaler, as they must."""
        return self.trainer.precision == "16-mixed"

    def _refuse(self, window: Window) -> None:
        """Stop the run, or drop the update, of a window that is not finite."""
        step = self.trainer.global_step
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        blame = "; ".join(over_ranks(window.blame(self.global_rank, dataset)))
        if self._on_nonfinite == "stop":
            self.rewind_window()
            raise NonFiniteError(step, blame)
        self._num_skipped += 1
        self._balance.begin_window()
        for parameter in self.parameters():
            parameter.grad = None  # an optimizer leaves what has no gradient as it is
        if self.trainer.is_global_zero:
            _log.warning("step %d is skipped: %s", step, blame)

    def _means(self, sums: Sums) -> dict[str, Tensor]:
        names = sorted({name for names in over_ranks(sorted(sums.values)) for name in names})
        if not names:
            return {}
        empty = torch.zeros(2, dtype=torch.float64)
        values = [sums.values.get(name, empty).to(self.device) for name in names]
        pairs = self._sum_over_ranks(torch.stack(values))  # (names, 2)
        return {name: total / count for name, (total, count) in zip(names, pairs, strict=True)}

    def _report(self, split: str) -> None:
        values = self._means(self._evaluated) | self.evaluation()
        self._evaluated = Sums()
        for name, value in values.items():
            self.log(f"{split}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)

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


def _build(
    config: ModelConfig | None, init_from: Path | None, lora: LoRAConfig | None
) -> Transformer:
    if config is not None and init_from is not None:
        raise ValueError(
            f"model and init_from {init_from} contradict each other: a folder has its own shape; "
            "set one of them to null"
        )
    if config is not None and lora is not None:
        raise ValueError("lora adapts a model that has learnt already: set init_from, not model")
    if config is not None:
        return AutoModel.from_config(config)
    if init_from is None:
        raise ValueError("nothing to train: set model for a new model, or init_from to a folder")
    if lora is not None and is_adapter_folder(init_from):
        raise ValueError(
            f"init_from {init_from} is an adapter itself; merge it first (astrai-model merge "
            f"{init_from} --out FOLDER) and start from that folder"
        )
    if (scheme := described_scheme(read_config_json(init_from))) is not None:
        raise ValueError(
            f"init_from {init_from} holds {scheme} weights, which cannot learn; start from the "
            "folder it was made from, and quantise what comes out"
        )
    # float32 also where the folder is bfloat16, in which small updates would round to nothing
    model = AutoModel.from_pretrained(init_from, torch.float32).train()
    merge_lora(model)
    if lora is not None:
        adapt(model, lora, init_from)
    return model


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
