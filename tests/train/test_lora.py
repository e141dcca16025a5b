"""Runs that train adapters: the base stays, checkpoints are adapters, going on is exact."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from astrai_core.model import AutoModel, ModelConfig
from astrai_core.model.adapter import adapt
from astrai_core.model.lora import LoRAConfig, lora_layers
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.cli import main
from astrai_train.modules import SFTModule
from astrai_train.optim import OptimizerConfig, build_optimizer

CHATS = [
    [{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": f"{2 * n}, 你好"}]
    for n in range(40)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model folder with its tokenizer, and conversations."""
    folder = tmp_path_factory.mktemp("lora")
    tokenizer = AutoTokenizer.train([str(CHATS)], 300)
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=16, n_layers=2, dim_ffn=24, n_heads=2, max_len=64
    )
    AutoModel.save_pretrained(AutoModel.from_config(shape), folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = [json.dumps({"messages": chat}) + "\n" for chat in CHATS]
    (folder / "sft.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def fit(world: Path, run: Path, steps: int, **changes) -> Path:
    """Train adapters in the folder `run` and return the last checkpoint."""
    options = {
        "trainer.default_root_dir": run,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": steps,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "model.init_args.init_from": world / "base",
        "model.init_args.compile": "false",
        "model.init_args.optimizer.lr": 0.02,
        "model.init_args.schedule.total_steps": 6,
        "model.init_args.schedule.warmup_steps": 1,
        "model.init_args.lora.rank": 4,
        "model.init_args.lora.dropout": 0.1,
        "data.init_args.tokenizer": world / "base",
        "data.init_args.train": world / "sft.jsonl",
        "data.init_args.stage": "sft",
        "data.init_args.window_size": 32,
        "data.init_args.batch_size": 4,
    } | changes
    given = [f"--{key}={value}" for key, value in options.items() if value is not None]
    main(["fit", "--model=SFTModule", "--data=TokenDataModule", *given])
    return (run / "checkpoints" / "last").resolve()


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The last checkpoint of a run of six steps that was never stopped."""
    return fit(world, world / "whole", 6)


def test_a_checkpoint_is_an_adapter_that_loads_with_its_base(world, whole):
    names = {path.name for path in whole.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
    config = json.loads((whole / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((world / "base").resolve())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 32, 0.1)
    model, base = AutoModel.from_pretrained(whole), AutoModel.from_pretrained(world / "base")
    assert all(layer.lora_B.abs().max() > 1e-3 for layer in lora_layers(model).values())
    ids = torch.arange(12).view(1, 12)
    assert (model(ids)["logits"] - base(ids)["logits"]).abs().max() > 1e-2


def test_the_run_learns_and_names_what_it_trains(world, whole, tmp_path, capsys):
    losses = [row.split(",") for row in (world / "whole" / "metrics.csv").read_text().splitlines()]
    column = losses[0].index("train/loss")
    assert float(losses[-1][column]) < float(losses[1][column]) - 0.05
    fit(world, tmp_path, 1)
    model = AutoModel.from_pretrained(whole)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert f"{total:,} parameters, {trained:,} of them trained" in capsys.readouterr().out


def test_going_on_equals_a_run_never_stopped(world, whole, tmp_path):
    fit(world, tmp_path, 3)
    resumed = fit(world, tmp_path, 6)
    for file in ("adapter_model.safetensors", "trainer/state.safetensors"):
        expected, found = load_file(whole / file), load_file(resumed / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), file
    assert (world / "whole" / "metrics.csv").read_text().count("\n") == 7
    # each optimizer state is of an adapter: two moments and a step of 2 x 7 x 2 matrices
    moments = [name for name in load_file(whole / "trainer/state.safetensors") if "exp_avg" in name]
    assert len(moments) == 2 * 28


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_leaves_the_base_bit_for_bit(world, optimizer):
    module = SFTModule(init_from=world / "base", lora=LoRAConfig(rank=2), compile=False)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    updater = build_optimizer(module.model, OptimizerConfig(name=optimizer, lr=0.1))
    module.model(torch.arange(10).view(1, 10))["logits"].square().mean().backward()
    updater.step()
    for name, value in module.model.state_dict().items():
        if not name.endswith("lora_A"):  # its gradient is zero as long as B is
            assert torch.equal(value, before[name]) == (not name.endswith("lora_B")), name


def test_a_run_may_begin_with_an_adapter_as_the_whole_model_it_is(world, whole):
    module = SFTModule(init_from=whole, compile=False)
    assert not lora_layers(module.model)
    assert all(parameter.requires_grad for parameter in module.parameters())
    ids = torch.arange(12).view(1, 12)
    torch.testing.assert_close(
        module.model.eval()(ids)["logits"],
        AutoModel.from_pretrained(whole)(ids)["logits"],
        atol=1e-5,
        rtol=1e-5,
    )


def test_adapters_on_an_adapter_are_refused_with_the_way_out(whole):
    with pytest.raises(ValueError, match="is an adapter itself; merge it first"):
        SFTModule(init_from=whole, lora=LoRAConfig())


def test_a_new_model_is_not_adapted():
    with pytest.raises(ValueError, match="set init_from, not model"):
        SFTModule(model=ModelConfig(vocab_size=9), lora=LoRAConfig())


def refusal(capsys, *arguments, **changes) -> str:
    with pytest.raises(SystemExit) as end:
        fit(*arguments, **changes)
    assert end.value.code != 0
    return capsys.readouterr().err


def test_other_adapters_are_no_continuation(world, whole, tmp_path, capsys):
    shutil.copytree(whole.parents[1], tmp_path, dirs_exist_ok=True)
    rank = {"model.init_args.lora.rank": 8}
    assert "lora.rank was 4 and is now 8" in refusal(capsys, world, tmp_path, 7, **rank)
    given = {"ckpt_path": whole, **rank}
    assert "adapter of another rank" in refusal(capsys, world, tmp_path / "new", 7, **given)
    given = {"ckpt_path": whole, "model.init_args.lora.rank": None}
    given["model.init_args.lora.dropout"] = None
    assert "has no lora" in refusal(capsys, world, tmp_path / "full", 7, **given)


def test_a_base_that_changed_ends_the_run_and_the_loading(world, whole, tmp_path, capsys):
    shutil.copytree(world / "base", tmp_path / "base")
    shutil.copy(world / "sft.jsonl", tmp_path)
    last = fit(tmp_path, tmp_path / "run", 1)
    base = AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.norm.weight[0] += 1e-3
    AutoModel.save_pretrained(base, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "base")
    assert "the base has changed" in refusal(capsys, tmp_path, tmp_path / "run", 2)
    with pytest.raises(ValueError, match="they have changed since"):
        AutoModel.from_pretrained(last)


@pytest.mark.slow
def test_compiled_adapters_learn_as_uncompiled_ones(world):
    eager = AutoModel.from_pretrained(world / "base")
    adapt(eager, LoRAConfig(rank=2), world / "base")
    for layer in lora_layers(eager).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    ids = torch.arange(12).view(1, 12)
    eager.hidden_states(ids).square().mean().backward()
    expected = {name: p.grad for name, p in eager.named_parameters() if p.requires_grad}
    eager.zero_grad()
    torch.compile(eager.hidden_states)(ids).square().mean().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(eager.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)
