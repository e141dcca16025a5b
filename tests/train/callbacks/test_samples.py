import lightning as L
import pytest
import torch

from astrai_core.model import ModelConfig, Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.callbacks.samples import Samples, continue_greedily
from astrai_train.modules import SEQModule
from astrai_train.report.history import SAMPLES, read_samples

TOKENIZER = AutoTokenizer.train(["hello"], 259)
SMALL = ModelConfig(vocab_size=259, dim=16, n_layers=2, dim_ffn=24, n_heads=2, max_len=24)
CHAT = [{"role": "user", "content": "hi"}]


class Rows(L.LightningDataModule):
    """Four random batches in each epoch."""

    num_train_batches = 4
    tokenizer: AutoTokenizer | None = TOKENIZER

    def train_dataloader(self) -> "Rows":
        return self

    def val_dataloader(self) -> "Rows":
        return self

    def __len__(self) -> int:
        return self.num_train_batches

    def __iter__(self):
        for _ in range(len(self)):
            ids = torch.randint(259, (2, 9))
            yield {
                "input_ids": ids[:, :-1],
                "labels": ids[:, 1:],
                "position_ids": torch.arange(8).repeat(2, 1),
                "document_ids": torch.zeros(2, 8, dtype=torch.int64),
            }


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(*callbacks: L.Callback, data: Rows | None = None) -> SEQModule:
    torch.manual_seed(0)
    module = SEQModule(SMALL, compile=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data or Rows())
    return module


def test_samples_are_printed_and_nothing_else_changes(capsys):
    """The data is drawn during training, so a moved random state would show in the weights."""
    silent = train()
    talking = train(Samples(["hello", CHAT], every_n_steps=2, max_new_tokens=3))
    printed = capsys.readouterr().out
    assert printed.count("samples after step") == 2
    assert "samples after step 2\n  hello -> " in printed
    assert "\n  hi -> " in printed
    torch.testing.assert_close(talking.state_dict(), silent.state_dict(), rtol=0, atol=0)
    assert all(module.training for module in talking.model.modules())


def test_the_run_keeps_its_samples_and_a_resumed_run_drops_those_it_makes_again(tmp_path):
    (tmp_path / SAMPLES).write_text('{"step": 9, "prompt": "p", "text": "of another run"}\n{"ste')
    module = train(Samples(["hello", CHAT], every_n_steps=2, max_new_tokens=3))
    kept = read_samples(tmp_path / SAMPLES)
    assert [(one.step, one.prompt) for one in kept] == [
        (2, "hello"),
        (2, "hi"),
        (4, "hello"),
        (4, "hi"),
    ]
    prompts = (TOKENIZER.encode("hello"), TOKENIZER.apply_chat_template(CHAT))
    texts = [
        TOKENIZER.decode(continue_greedily(module.model, ids, 3, TOKENIZER.stop_ids))
        for ids in prompts
    ]
    assert [one.text for one in kept[2:]] == texts


def test_greedy_takes_the_likeliest_and_keeps_modes():
    torch.manual_seed(0)
    model = Transformer(SMALL)
    model.layers[0].eval()
    new = continue_greedily(model, [5, 6], 4, ())
    tokens = [5, 6]
    for _ in range(4):
        tokens.append(int(model(torch.tensor([tokens]))["logits"][0, -1].argmax()))
    assert new == tokens[2:]
    assert model.training
    assert not model.layers[0].training


def test_an_answer_ends_at_a_stop_token_or_at_the_end_of_the_context():
    torch.manual_seed(0)
    model = Transformer(SMALL)
    free = continue_greedily(model, [5, 6], 100, ())
    assert len(free) == 22  # max_len 24
    assert continue_greedily(model, [5, 6], 100, {free[0]}) == []


def test_bad_options_are_refused_by_name():
    with pytest.raises(ValueError, match="every_n_steps of Samples must be 1 or more, not 0"):
        Samples(["a"], every_n_steps=0)
    with pytest.raises(ValueError, match="must not be empty"):
        Samples([""])
    with pytest.raises(ValueError, match=r"has 30 tokens.*max_len 24"):
        train(Samples(["x" * 30]))


def test_a_run_without_a_tokenizer_is_told():
    data = Rows()
    data.tokenizer = None
    with pytest.raises(ValueError, match="needs a tokenizer"):
        train(Samples(["hello"]), data=data)
