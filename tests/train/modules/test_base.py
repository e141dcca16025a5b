import copy
import math
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.losses import IGNORED
from astrai_train.modules import SEQModule, SFTModule
from astrai_train.optim import OptimizerConfig
from astrai_train.schedules import ScheduleConfig

from .gradients import assert_same_gradients

SMALL = ModelConfig(vocab_size=300, dim=16, n_layers=2, dim_ffn=24, n_heads=2, max_len=32)
ROWS, LENGTH = 8, 12


def make_rows(num_rows: int = ROWS) -> dict[str, Tensor]:
    """Rows of two documents; row n has n labels, so that rows weigh differently."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(300, (num_rows, LENGTH + 1), generator=generator)
    position = torch.arange(LENGTH)
    labels = ids[:, 1:].masked_fill(position >= torch.arange(num_rows)[:, None], IGNORED)
    return {
        "input_ids": ids[:, :-1],
        "labels": labels,
        "position_ids": torch.where(position < 5, position, position - 5).repeat(num_rows, 1),
        "document_ids": (position >= 5).long().repeat(num_rows, 1),
    }


class Rows(L.LightningDataModule):
    """The rows in micro-batches, split over ranks by turns."""

    def __init__(self, batch_size: int, tokenizer: object = None):
        super().__init__()
        self.batch_size, self.tokenizer = batch_size, tokenizer
        self.num_train_batches = ROWS // batch_size

    def train_dataloader(self) -> "Batches":
        trainer = self.trainer
        assert trainer is not None
        rows = {k: v[trainer.global_rank :: trainer.world_size] for k, v in make_rows().items()}
        return Batches(rows, self.batch_size)

    def val_dataloader(self) -> "Batches":
        return self.train_dataloader()


class ThreeLengths:
    """What is asked of a tokenizer: token n is n % 3 bytes long."""

    vocab_size = 300
    token_byte_lengths = tuple(n % 3 for n in range(300))


class Batches:
    """A loader in its simplest form; Lightning takes a list for several loaders."""

    def __init__(self, rows: dict[str, Tensor], batch_size: int):
        self.rows, self.batch_size = rows, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.rows["labels"]) / self.batch_size)

    def __iter__(self):
        for n in range(len(self)):
            cut = slice(n * self.batch_size, (n + 1) * self.batch_size)
            yield {name: value[cut] for name, value in self.rows.items()}


class Recording(SEQModule):
    """Keeps the gradients and learning rate of every optimizer step."""

    def __init__(self, **options):
        super().__init__(**{"model": SMALL, "compile": False, **options})
        self.gradients: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        names = self.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in names if p.grad is not None})
        self.rates.append(optimizer.param_groups[0]["lr"])


def make_trainer(**options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "devices": 1, "num_sanity_val_steps": 0, **options},
    )


def record(batch_size: int, accumulate: int, **options) -> Recording:
    torch.manual_seed(0)
    module = Recording()
    trainer = make_trainer(accumulate_grad_batches=accumulate, limit_val_batches=0, **options)
    trainer.fit(module, datamodule=Rows(batch_size))
    return module


def plain_gradients(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over all tokens in plain torch, each document in a forward of its own."""
    torch.manual_seed(0)
    model = Transformer(SMALL)
    logits = torch.cat([model(rows["input_ids"][:, cut])["logits"] for cut in DOCUMENTS], dim=1)
    F.cross_entropy(logits.flatten(0, 1), rows["labels"].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


DOCUMENTS = (slice(0, 5), slice(5, LENGTH))


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_gradients_do_not_depend_on_micro_batches(batch_size, accumulate):
    """The micro-batches hold 0 to 28 labels each; the first of 1 x 8 holds none at all."""
    (gradients,) = record(batch_size, accumulate).gradients
    assert_same_gradients(gradients, plain_gradients(make_rows()))


def test_a_short_last_window_is_divided_by_its_own_tokens():
    """Windows of six and of two rows; a learning rate of almost nothing keeps the weights."""
    torch.manual_seed(0)
    module = Recording(optimizer=OptimizerConfig(lr=1e-12))
    trainer = make_trainer(accumulate_grad_batches=3, limit_val_batches=0)
    trainer.fit(module, datamodule=Rows(2))
    first, last = module.gradients
    rows = make_rows()
    for gradients, cut in ((first, slice(0, 6)), (last, slice(6, 8))):
        wanted = plain_gradients({name: value[cut] for name, value in rows.items()})
        assert_same_gradients(gradients, wanted)


@pytest.mark.dist
def test_two_ranks_give_the_gradients_of_one(tmp_path):
    """Each rank takes every other row, so one has 12 labels and the other 16."""
    file = tmp_path / "gradients.pt"
    torch.manual_seed(0)

    class Saving(Recording):
        def on_train_end(self):
            if self.global_rank == 0:
                torch.save(self.gradients, file)

    trainer = make_trainer(
        devices=2, strategy="ddp_fork", accumulate_grad_batches=2, limit_val_batches=0
    )
    trainer.fit(Saving(), datamodule=Rows(2))
    (gradients,) = torch.load(file)
    assert_same_gradients(gradients, plain_gradients(make_rows()))


@pytest.mark.dist
def test_a_fit_of_two_ranks_is_that_of_one(tmp_path):
    """Six steps; eps keeps AdamW from blowing up gradients that are rounding alone."""
    options: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 0}
    optimizer = OptimizerConfig(lr=0.01, eps=1e-2)

    class Saving(Recording):
        def on_train_end(self):
            if self.global_rank == 0:
                torch.save(self.model.state_dict(), tmp_path / f"{self.trainer.world_size}.pt")

    for devices, strategy, batch_size in ((1, "auto", 4), (2, "ddp_fork", 2)):
        torch.manual_seed(0)
        trainer = make_trainer(devices=devices, strategy=strategy, **options)
        trainer.fit(Saving(optimizer=optimizer), datamodule=Turns(batch_size))
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    for name, wanted in one.items():
        assert (two[name] - wanted).norm() <= 1e-5 * wanted.norm(), name


class Turns(Rows):
    """Two steps an epoch, of the same four rows whatever the number of ranks."""

    def __init__(self, batch_size: int):
        super().__init__(batch_size)
        self.num_train_batches = 2


def test_the_schedule_moves_with_optimizer_steps_and_ends_with_the_run():
    """Four micro-batches, two to a step, three epochs: six steps, by the cosine's formula."""
    schedule = ScheduleConfig(warmup_steps=2, min_ratio=0.0)
    module = Recording(schedule=schedule, optimizer=OptimizerConfig(lr=1.0))
    trainer = make_trainer(accumulate_grad_batches=2, max_epochs=3, limit_val_batches=0)
    trainer.fit(module, datamodule=Rows(2))
    falling = [(1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)]
    assert module.rates == pytest.approx([0.5, 1.0, *falling])


def test_max_steps_bounds_the_schedule():
    module = Recording(schedule=ScheduleConfig(warmup_steps=0, min_ratio=0.0))
    trainer = make_trainer(max_steps=2, max_epochs=-1, limit_val_batches=0)
    trainer.fit(module, datamodule=Rows(2))
    assert module.rates == pytest.approx([1e-3, 0.5e-3])


def test_an_endless_run_needs_a_horizon():
    trainer = make_trainer(max_epochs=-1, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        trainer.fit(Recording(), datamodule=Rows(2))


def test_clipping_bounds_the_norm_of_the_divided_gradient():
    torch.manual_seed(0)
    module = Recording()
    trainer = make_trainer(gradient_clip_val=0.01, limit_val_batches=0)
    trainer.fit(module, datamodule=Rows(8))
    (gradients,) = module.gradients
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_what_is_logged_is_weighted_by_tokens(tmp_path):
    """Two steps of unequal micro-batches; the same numbers come from plain torch."""
    module = Recording(optimizer=OptimizerConfig(lr=1e-12))
    model = copy.deepcopy(module.model)
    trainer = make_trainer(log_every_n_steps=2, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=Rows(2, ThreeLengths()))
    rows = make_rows()
    logits = torch.cat([model(rows["input_ids"][:, cut])["logits"] for cut in DOCUMENTS], dim=1)
    loss = F.cross_entropy(logits.flatten(0, 1), rows["labels"].flatten()).item()
    trained = rows["labels"][rows["labels"] >= 0]
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["train/loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["val/loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["val/ppl"] == pytest.approx(math.exp(loss), rel=1e-4)
    num_bytes = sum(token % 3 for token in trained.tolist())
    wanted = loss * len(trained) / math.log(2) / num_bytes
    assert metrics["val/bpb"] == pytest.approx(wanted, rel=1e-4)


def test_a_tokenizer_that_does_not_fit_is_refused_by_both_sizes():
    tokenizer = AutoTokenizer.train(["hello 你好"], 259)
    module = Recording(model=ModelConfig(vocab_size=100, dim=16, n_layers=1, dim_ffn=16, n_heads=2))
    with pytest.raises(ValueError, match=r"tokenizer has 259 tokens.*vocab_size is 100"):
        make_trainer().fit(module, datamodule=Rows(2, tokenizer))


def test_a_model_comes_from_a_shape_or_from_a_folder(tmp_path):
    source = Transformer(SMALL).bfloat16()
    AutoModel.save_pretrained(source, tmp_path)
    module = SFTModule(init_from=tmp_path)
    weight = module.model.layers[1].mlp.up_proj.weight  # pyright: ignore
    assert weight.dtype == torch.float32
    assert torch.equal(weight, source.layers[1].mlp.up_proj.weight.float())  # pyright: ignore
    with pytest.raises(ValueError, match="contradict each other"):
        SFTModule(model=SMALL, init_from=tmp_path)
    with pytest.raises(ValueError, match="nothing to train"):
        SFTModule()


def test_the_state_holds_the_model_and_nothing_else():
    module = SEQModule(SMALL)
    assert {name.removeprefix("model.") for name in module.state_dict()} == set(
        module.model.state_dict()
    )
