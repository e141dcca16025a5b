import json
import shutil

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.model.lora import LoRAConfig, lora_layers
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.module import TokenDataModule
from astrai_train.data.pairs import DPODataset
from astrai_train.modules.dpo import DPOModule, PreferenceConfig
from astrai_train.optim import OptimizerConfig
from astrai_train.schedules import ScheduleConfig

from .gradients import assert_same_gradients

PAIRS = [
    {"prompt": f"{n} + {n}?", "chosen": f"It is {2 * n}" + "!" * (n % 4), "rejected": "no " * n}
    for n in range(1, 9)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer, a model folder and eight ragged pairs."""
    folder = tmp_path_factory.mktemp("dpo")
    tokenizer = AutoTokenizer.train([json.dumps(PAIRS)], 280)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(1)
    model = Transformer(
        ModelConfig(vocab_size=tokenizer.vocab_size, dim=16, n_layers=2, dim_ffn=32, n_heads=2)
    )
    with torch.no_grad():  # far from uniform
        model.embed_tokens.weight.mul_(8)
    AutoModel.save_pretrained(model, folder / "model")
    lines = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
    (folder / "pairs.jsonl").write_text(lines)
    return folder


class Recording(DPOModule):
    """Keeps the gradients of each step, as the optimizer sees them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        named = self.model.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def module_of(world, kind=Recording, **options):
    options.setdefault("preference", PreferenceConfig(beta=0.5))
    return kind(
        init_from=world / "model",
        optimizer=OptimizerConfig(lr=options.pop("lr", 0.01), weight_decay=0.0),
        schedule=ScheduleConfig(name="cosine", warmup_steps=0, min_ratio=1.0),
        compile=False,
        **options,
    )


def data_of(world, batch_size=4, train=None, **options):
    return TokenDataModule(
        tokenizer=world / "tokenizer",
        train=train or world / "pairs.jsonl",
        stage="dpo",
        window_size=64,
        batch_size=batch_size,
        **options,
    )


def trainer_of(**options):
    return L.Trainer(
        accelerator="cpu",
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "max_epochs": 1,
            "devices": 1,
            "use_distributed_sampler": False,
            "limit_val_batches": 0,
            **options,
        },
    )


def fit(world, batch_size=4, data=None, **options):
    module = module_of(world, **{k: options.pop(k) for k in ("preference", "lr") if k in options})
    trainer = trainer_of(**options)
    trainer.fit(module, datamodule=data or data_of(world, batch_size))
    return module, trainer


def plain_gradients(world, beta=0.5):
    """The mean over all pairs in plain torch, one sequence a forward, no packing."""
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    policy = AutoModel.from_pretrained(world / "model", torch.float32)

    def logprob(prompt, answer):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids, trained = tokenizer.encode_chat_with_mask(chat)
        table = F.log_softmax(policy(torch.tensor([ids]))["logits"][0, :-1], dim=-1)
        each = table.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        return (each * torch.tensor(trained[1:])).sum()

    losses = []
    for pair in PAIRS:
        chosen = logprob(pair["prompt"], pair["chosen"])
        rejected = logprob(pair["prompt"], pair["rejected"])
        gain = (chosen - chosen.detach()) - (rejected - rejected.detach())
        losses.append(-F.logsigmoid(beta * gain))
    torch.stack(losses).mean().backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (1, 8), (3, 3)])
def test_gradients_are_those_of_single_sequences(world, batch_size, accumulate):
    """3 x 3 has a last micro-batch with two pairs."""
    module, _ = fit(world, batch_size, accumulate_grad_batches=accumulate)
    (gradients,) = module.gradients
    assert_same_gradients(gradients, plain_gradients(world))


@pytest.mark.dist
def test_two_ranks_give_the_gradients_of_one(world, tmp_path):
    """Three pairs a rank and two, so one rank's last micro-batch is empty."""
    shutil.copy(world / "pairs.jsonl", tmp_path / "pairs.jsonl")
    file = tmp_path / "gradients.pt"

    class Saving(Recording):
        def on_train_end(self):
            if self.global_rank == 0:
                torch.save(self.gradients, file)

    trainer = trainer_of(devices=2, strategy="ddp_fork", accumulate_grad_batches=3)
    data = data_of(world, 3, train=tmp_path / "pairs.jsonl")
    trainer.fit(module_of(world, Saving), datamodule=data)
    (gradients,) = torch.load(file)
    assert_same_gradients(gradients, plain_gradients(world))
    assert len(list(tmp_path.glob("pairs.jsonl.reference-*"))) == 1


def test_training_raises_the_margin(world):
    _, trainer = fit(world, 8, max_epochs=20, log_every_n_steps=10)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["rewards/accuracies"] == 1
    assert metrics["rewards/margins"] > 1
    margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    assert metrics["rewards/margins"] == pytest.approx(margin, rel=1e-4)
    assert metrics["train/loss"] < 0.5
    assert metrics["logps/chosen"] < 0


def test_before_training_no_side_is_preferred(world):
    data = data_of(world, val=world / "pairs.jsonl")
    trainer = trainer_of(limit_val_batches=1.0)
    (values,) = trainer.validate(module_of(world), datamodule=data, verbose=False)
    assert values["val/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert values["val/rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_without_a_reference_the_score_is_the_likelihood(world, tmp_path):
    shutil.copy(world / "pairs.jsonl", tmp_path / "alone.jsonl")
    data = data_of(world, train=tmp_path / "alone.jsonl", val=tmp_path / "alone.jsonl")
    module = module_of(world, preference=PreferenceConfig(beta=1.0, reference="none"))
    (values,) = trainer_of(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    margin = values["val/logps/chosen"] - values["val/logps/rejected"]
    assert values["val/rewards/margins"] == pytest.approx(margin, rel=1e-5)
    assert not list(tmp_path.glob("*reference*"))


def cache_of(folder):
    return sorted(folder.glob("*.reference-*.safetensors"))


@pytest.fixture
def lines(world, tmp_path):
    return shutil.copy(world / "pairs.jsonl", tmp_path / "some.jsonl")


def test_the_reference_is_computed_once_and_goes_on_where_it_was(world, lines, capsys):
    fit(world, data=data_of(world, train=lines))
    (file,) = cache_of(lines.parent)
    whole = load_file(file)["logprobs"]
    assert "computing the reference's log-probabilities: " in capsys.readouterr().out
    fit(world, data=data_of(world, train=lines))
    assert "computing" not in capsys.readouterr().out

    part = whole.copy()
    part[3:6] = float("nan")
    save_file({"logprobs": part}, file)
    seen = []

    class Counting(Recording):
        def _compute(self, dataset, file, numbers):
            seen.extend(numbers)
            super()._compute(dataset, file, numbers)

    trainer_of().fit(module_of(world, Counting), datamodule=data_of(world, train=lines))
    assert sorted(seen) == [3, 4, 5]
    torch.testing.assert_close(load_file(file)["logprobs"], whole, rtol=1e-5, atol=1e-5)


def test_other_weights_or_data_have_a_reference_of_their_own(world, lines, tmp_path, capsys):
    fit(world, data=data_of(world, train=lines))
    other = AutoModel.from_pretrained(world / "model", torch.float32)
    with torch.no_grad():
        other.embed_tokens.weight[5, 3] += 1e-3
    AutoModel.save_pretrained(other, tmp_path / "other")
    capsys.readouterr()
    module = module_of(world)
    module.model = other
    trainer_of().fit(module, datamodule=data_of(world, train=lines))
    said = capsys.readouterr().out
    assert "because the weights that training starts from changed" in said
    lines.write_text(lines.read_text() + json.dumps(PAIRS[0] | {"chosen": "2"}) + "\n")
    fit(world, data=data_of(world, train=lines))
    assert "because" in (said := capsys.readouterr().out)
    assert "the data changed" in said
    assert len(cache_of(tmp_path)) == 3


def test_a_damaged_cache_is_named(world, lines):
    fit(world, data=data_of(world, train=lines))
    (file,) = cache_of(lines.parent)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"some\.jsonl\.reference-.* is damaged .*delete it"):
        fit(world, data=data_of(world, train=lines))


def test_a_run_does_not_go_on_with_another_reference(world):
    module, _ = fit(world)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"init_from .* gives other weights than when this run"):
        module.on_load_checkpoint(checkpoint | {"reference_weights": "else"})


def reference_of(data):
    assert isinstance(data.train_dataset, DPODataset)
    assert data.train_dataset.reference is not None
    return data.train_dataset.reference


def test_without_its_adapters_the_model_is_the_reference(world, lines, tmp_path):
    """New adapters add nothing, so both references are the same numbers."""
    values = []
    for reference in ("lora_off", "start"):
        module = module_of(
            world,
            preference=PreferenceConfig(reference=reference),
            lora=LoRAConfig(rank=2),
        )
        data = data_of(world, train=lines)
        trainer_of().fit(module, datamodule=data)
        assert set(module.gradients[0]) == {n for n in module.gradients[0] if "lora_" in n}
        values.append(reference_of(data))
    assert (values[0] == values[1]).all()
    assert len(cache_of(tmp_path)) == 2
    trained = module_of(
        world, preference=PreferenceConfig(reference="lora_off"), lora=LoRAConfig(rank=3)
    )
    with torch.no_grad():
        for layer in lora_layers(trained.model).values():
            layer.lora_B.normal_()
    data = data_of(world, train=lines)
    trainer_of().fit(trained, datamodule=data)
    assert (reference_of(data) == values[0]).all()
    assert len(cache_of(tmp_path)) == 2


def test_adapters_are_needed_for_a_reference_without_them(world):
    with pytest.raises(ValueError, match="lora_off needs adapters, and the model has none"):
        module_of(world, preference=PreferenceConfig(reference="lora_off"))
    with pytest.raises(ValueError, match=r"lora\.dropout must be 0 in DPO"):
        module_of(world, lora=LoRAConfig(rank=2, dropout=0.1))


def test_predict_gives_the_margin_of_each_pair(world):
    data = data_of(world, batch_size=3, predict=world / "pairs.jsonl")
    batches = trainer_of().predict(module_of(world), datamodule=data)
    lines = [line for batch in batches or [] for line in batch]
    assert [line["pair"] for line in lines] == list(range(8))
    assert all(abs(line["margin"]) < 1e-4 for line in lines)
    assert all(line["logp_rejected"] < 0 for line in lines)


def test_other_data_than_pairs_is_refused(world, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "abc def"}) + "\n")
    data = TokenDataModule(tokenizer=world / "tokenizer", train=tmp_path / "texts.jsonl")
    with pytest.raises(ValueError, match=r"learns from pairs: set data\.stage to dpo"):
        trainer_of().fit(module_of(world), datamodule=data)
