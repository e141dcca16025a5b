from pathlib import Path

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser

from astrai_train.data.datasets import SEQDataset
from astrai_train.data.loader import ResumableLoader
from astrai_train.data.module import TokenDataModule


def module(folder, name="texts.jsonl", **options):
    options = {"stage": "seq", "window_size": 16, "batch_size": 2} | options
    return TokenDataModule(folder / "tok", **{"train": folder / name, **options})


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
    rows = data.train_dataset
    assert isinstance(rows, SEQDataset)
    assert first[0][0] == rows[0]["input_ids"].tolist()


def test_sources_are_mixed_by_weight_in_training_alone(folder, write_lines):
    write_lines(folder / "short.jsonl", [{"text": "x"}])
    both = [folder / "texts.jsonl", folder / "short.jsonl"]
    plain = module(folder, train=both, val=both)
    mixed = module(folder, train=both, val=both, weights=[3, 1])
    sizes = [len(module(folder, name).train_dataset) for name in ("texts.jsonl", "short.jsonl")]
    assert sizes[1] == 1
    assert len(mixed.train_dataset) == sizes[0] + round(sizes[0] / 3)
    mixed_val, plain_val = mixed.val_dataset, plain.val_dataset
    assert isinstance(mixed_val, SEQDataset)
    assert isinstance(plain_val, SEQDataset)
    assert len(mixed_val) == len(plain_val)
    shapes = {batch["labels"].shape for batch in mixed.train_dataloader()}
    assert shapes == {(2, 16)}
    with pytest.raises(ValueError, match="weights has 1 numbers for 2 sources"):
        _ = module(folder, train=both, weights=[1]).train_dataset


def test_overlapping_rows_count_once_in_evaluation(folder):
    data = module(folder, val=folder / "texts.jsonl", stride=4)
    train, val = data.train_dataset, data.val_dataset
    whole = module(folder).train_dataset
    assert isinstance(train, SEQDataset)
    assert isinstance(val, SEQDataset)
    assert isinstance(whole, SEQDataset)
    labels = [row["labels"] for row in (whole[n] for n in range(len(whole)))]
    counted = [row["labels"] for row in (val[n] for n in range(len(val)))]
    assert len(train) == len(val) > 3 * len(whole)
    assert torch.equal(
        *(torch.cat(rows)[torch.cat(rows) != -100] for rows in (labels, counted))
    )  # the same labels in the same order, each once
    for number in range(1, len(val)):
        assert torch.equal(train[number]["input_ids"], val[number]["input_ids"])
        assert torch.equal(train[number]["labels"][12:], val[number]["labels"][12:])
        assert (val[number]["labels"][:12] == -100).all()
    repeated = train[1]["labels"][:12]
    assert torch.equal(repeated[4:], train[2]["labels"][:8])
    for stride, stage in ((17, "seq"), (0, "seq"), (4, "sft")):
        with pytest.raises(ValueError, match=rf"data.stride {stride} must be from 1"):
            module(folder, stride=stride, stage=stage)


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


def test_several_files_survive_the_saved_configuration(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TokenDataModule, "data")
    kind = f"{TokenDataModule.__module__}.TokenDataModule"
    given = {"tokenizer": "tok", "train": "[a.h5, b.h5]", "val": "[c.h5]", "test": "d.h5"}
    options = [f"--data.init_args.{name}={value}" for name, value in given.items()]
    config = parser.parse_args([f"--data={kind}", *options])
    again = parser.parse_string(parser.dump(config)).data.init_args
    assert again.train == [Path("a.h5"), Path("b.h5")]
    assert again.val == [Path("c.h5")]
    assert again.test == Path("d.h5")
