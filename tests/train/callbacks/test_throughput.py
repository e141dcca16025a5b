import time

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from astrai_core.model import ModelConfig
from astrai_train.callbacks.throughput import Throughput
from astrai_train.modules import SEQModule
from astrai_train.schedules import ScheduleConfig

SMALL = ModelConfig(vocab_size=20, dim=8, n_layers=1, dim_ffn=8, n_heads=2)


class SlowBatches:
    """Six batches of 2 x 10 positions, 5 of each row padding, each 20 ms in the making."""

    def __len__(self) -> int:
        return 6

    def __iter__(self):
        for _ in range(6):
            time.sleep(0.02)
            ids = torch.ones(2, 10, dtype=torch.int64)
            position = torch.arange(10).repeat(2, 1)
            documents = torch.where(position < 5, 0, -1)
            yield {
                "input_ids": ids,
                "labels": ids,
                "position_ids": position,
                "document_ids": documents,
            }


class SlowValidation(Callback):
    def on_validation_epoch_start(self, trainer, pl_module):
        time.sleep(0.5)


def test_real_tokens_over_the_time_without_validation(tmp_path):
    """30 tokens an interval of 3 batches, so at most 30 / 0.06 s; with the validation below 60."""
    rates: list[float] = []

    class Reading(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step % 3 == 0:
                rates.append(trainer.callback_metrics["train/tokens_per_s"].item())

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        log_every_n_steps=3,
        callbacks=[Throughput(), SlowValidation(), Reading()],
        logger=CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = SEQModule(SMALL, schedule=ScheduleConfig(total_steps=12), compile=False)
    trainer.fit(module, SlowBatches(), SlowBatches())
    assert len(rates) == 4
    assert all(60 < rate <= 30 / 0.06 for rate in rates[1:])
    assert rates[1] == pytest.approx(rates[3], rel=2)
