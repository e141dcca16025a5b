import lightning as L
import pytest
import torch

from astrai_train.data.loader import ResumableLoader
from astrai_train.data.module import TokenDataModule


def module(folder, name="texts.jsonl", **options):
    options = {"stage": "seq", "window_size": 16, "batch_size": 2} | options
    return TokenDataModule(folder / "tok", folder / name, **options)


def test_the_number_of_batches_is_known_before_fit(folder):
    data = module(folder)
    assert data.num_train_batches == len(list(data.train_dataloader()))
    assert data.tokenizer.vocab_size == 300
    assert data.val_dataloader() == []


def test_validation_is_in_order_and_has_no_epochs(folder):
    data = module(folder, val=[folder / "texts.jsonl"])
    loader = data.val_dataloader()
    assert isinstance(loader, ResumableLoader)
    first, second = ([batch["input_ids"].tolist() for batch in loader] for _ in range(2))
    assert first == second
    assert first[0][0] == data.train_dataset[0]["input_ids"].tolist()


@pytest.mark.parametrize("name", ["window_size", "batch_size", "num_workers"])
def test_an_impossible_option_is_named(folder, name):
    with pytest.raises(ValueError, match=rf"data\.{name} must be at least \d, not -1"):
        module(folder, "texts.jsonl", **{name: -1})


def test_a_mistake_in_validation_data_shows_before_training(folder):
    data = module(folder, "chats.jsonl", stage="sft", window_size=200, val=folder / "texts.jsonl")
    with pytest.raises(ValueError, match=r"texts\.jsonl line 1: stage sft wants"):
        data.setup("fit")


def test_lightning_runs_without_validation_data(folder):
    class Still(L.LightningModule):
        def training_step(self, batch):
            assert batch["labels"].shape == (2, 16)
            return torch.zeros((), requires_grad=True)

        def validation_step(self, batch):
            raise AssertionError

        def configure_optimizers(self):
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = module(folder)
    trainer.fit(Still(), data)
    assert trainer.fit_loop.total_batch_idx + 1 == data.num_train_batches
