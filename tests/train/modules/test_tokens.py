"""Objectives whose loss is the likelihood of tokens."""

import json
import re

import pytest
import torch

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.cli import main
from astrai_train.modules import SEQModule
from astrai_train.optim import OptimizerConfig
from astrai_train.schedules import ScheduleConfig

from .test_base import IGNORED, SMALL, Batches, Rows, make_rows, make_trainer


class Fixed(Rows):
    """The same rows as one batch, for so many steps."""

    def __init__(self, rows: dict[str, torch.Tensor]):
        super().__init__(len(rows["labels"]))
        self.rows, self.num_train_batches = rows, 1

    def train_dataloader(self) -> Batches:
        return Batches(self.rows, self.batch_size)


def test_thirty_two_tokens_are_learnt_by_heart():
    torch.manual_seed(0)
    ids = torch.randperm(300)[:33][None]
    place = torch.arange(32)[None]
    rows = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": place}
    rows["document_ids"] = torch.zeros_like(place)
    module = SEQModule(
        SMALL, compile=False, optimizer=OptimizerConfig(lr=0.03, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=5),
    )  # fmt: skip
    trainer = make_trainer(max_epochs=80, limit_val_batches=0, log_every_n_steps=80)
    trainer.fit(module, datamodule=Fixed(rows))
    with torch.no_grad():
        total, count = module.loss(rows)
    assert count == 32
    assert total / count < 0.01


def test_rows_without_a_label_leave_the_weights():
    rows = make_rows(2)
    rows["labels"] = torch.full_like(rows["labels"], IGNORED)
    module = SEQModule(SMALL, compile=False, optimizer=OptimizerConfig(weight_decay=0.0))
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    make_trainer(limit_val_batches=0).fit(module, datamodule=Fixed(rows))
    assert all(torch.equal(before[name], v) for name, v in module.model.state_dict().items())


def test_smoothing_is_trained_and_the_likelihood_is_reported_without():
    def fit(smoothing: float) -> dict[str, float]:
        torch.manual_seed(0)
        module = SEQModule(SMALL, smoothing, compile=False, optimizer=OptimizerConfig(lr=1e-12))
        trainer = make_trainer(log_every_n_steps=1)
        trainer.fit(module, datamodule=Rows(8))
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    plain, smoothed = fit(0.0), fit(0.5)
    for split in ("train", "val"):
        assert smoothed[f"{split}/nll"] == pytest.approx(plain[f"{split}/loss"], rel=1e-5)
        assert smoothed[f"{split}/loss"] != pytest.approx(plain[f"{split}/loss"], rel=1e-4)
    assert smoothed["val/ppl"] == pytest.approx(plain["val/ppl"], rel=1e-4)


def test_predict_scores_each_document_although_rows_cut_it(tmp_path, capsys):
    """Summed over the documents it is the loss that `test` reports."""
    texts = [f"{a} plus {b} is {a + b}. 你好" for a in range(4) for b in range(4)]
    AutoTokenizer.train(texts, 270).save_pretrained(tmp_path / "tokenizer")
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    options = {
        "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": tmp_path / "run", "model": "SEQModule",
        "model.init_args.model.vocab_size": 270, "model.init_args.model.dim": 16,
        "model.init_args.model.n_layers": 1, "model.init_args.model.dim_ffn": 16,
        "model.init_args.model.n_heads": 2, "data": "TokenDataModule",
        "data.init_args.tokenizer": tmp_path / "tokenizer", "data.init_args.window_size": 16,
        "data.init_args.batch_size": 4,
    }  # fmt: skip
    for split in ("train", "test", "predict"):
        options[f"data.init_args.{split}"] = tmp_path / "a.jsonl"
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    main(["predict", *arguments])
    found = (tmp_path / "run" / "predictions.jsonl").read_text("utf-8").splitlines()
    scores = [json.loads(line) for line in found]
    assert [score["place"] for score in scores] == [
        f"{tmp_path}/a.jsonl line {n + 1}" for n in range(16)
    ]
    capsys.readouterr()
    main(["test", *arguments])
    loss = -sum(score["logprob"] for score in scores) / sum(score["tokens"] for score in scores)
    told = re.search(r"test/loss\W+([\d.]+)", capsys.readouterr().out)
    assert told is not None
    assert float(told[1]) == pytest.approx(loss, rel=1e-6)
    assert scores[3]["nll"] == pytest.approx(-scores[3]["logprob"] / scores[3]["tokens"])
