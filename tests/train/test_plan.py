from pathlib import Path
from typing import Any

import pytest

from astrai_core.model import ModelConfig
from astrai_train import plan
from astrai_train.optim import OptimizerConfig
from astrai_train.plan import (
    Plan,
    describe_memory,
    describe_time,
    main,
    read_plan,
    suggested_precision,
)

CONFIGS = Path(__file__).parents[2] / "configs"
SEQ = f"--config={CONFIGS / 'seq.yaml'}"
SMALL = ModelConfig(vocab_size=300, dim=32, n_layers=2, dim_ffn=48, n_heads=4)


def make(**changes) -> Plan:
    fields: dict[str, Any] = {"rows": 4, "length": 64, "accumulate": 2, "devices": 1, "steps": 10}
    return Plan(config=SMALL, optimizer=OptimizerConfig(), **(fields | changes))


def test_a_run_is_read_from_its_configuration():
    options = ["--trainer.max_steps=7", "--data.init_args.batch_size=3"]
    read = read_plan([SEQ, *options])
    assert (read.rows, read.length, read.accumulate, read.steps) == (3, 512, 4, 7)
    assert read.config.dim == 192
    assert read.tokens_per_step == 3 * 512 * 4


def test_a_piece_alone_is_planned_with_defaults_for_the_rest():
    read = read_plan([f"--config={CONFIGS / 'model' / '1b.yaml'}"])
    assert read.config.n_layers == 20
    assert read.steps is None


def test_memory_that_is_there_fits_and_is_told_by_part():
    told = describe_memory(make(), 10**10)
    parts = ("weights", "gradients", "optimizer", "activations", "loss", "free memory", "it fits")
    assert all(part in told for part in parts)


def test_too_large_a_batch_is_refused_with_one_that_fits():
    """Room for two rows and a little: the other two become more micro-batches."""
    large = make(length=4096)
    assert large.needed(2) < large.needed(3)
    with pytest.raises(MemoryError, match=r"batch_size to 2 and .*accumulate_grad_batches to 4"):
        describe_memory(large, (large.needed(2) + large.needed(3)) // 2)


def test_too_large_a_row_and_too_large_a_model_are_told_apart():
    with pytest.raises(MemoryError, match=r"lower data\.window_size 4096"):
        describe_memory(make(length=4096), make(length=4096).needed(1) - 1)
    with pytest.raises(MemoryError, match="cannot train the model"):
        describe_memory(make(), 10**6)


def test_the_models_that_grpo_keeps_are_counted():
    """The first model, which kl asks for, and the engine's copy."""
    grpo = f"--config={CONFIGS / 'grpo.yaml'}"
    shape = "--model.init_args.model={vocab_size: 300, dim: 32, n_layers: 2, dim_ffn: 48}"
    shape = [shape, "--model.init_args.init_from=null"]
    alone = read_plan([grpo, *shape, "--model.init_args.policy.kl=none"])
    held = [f"--model.init_args.policy.{one}" for one in ("kl=k3", "kl_weight=0.1")]
    both = read_plan([grpo, *shape, *held])
    assert (alone.frozen, both.frozen) == (1, 2)
    assert both.needed(1) - alone.needed(1) == alone.beside == both.footprint(1).weights
    assert "not trained" in describe_memory(both, 10**12)
    assert "not trained" not in describe_memory(make(), 10**12)


def test_the_duration_follows_from_speed_and_steps():
    assert "steps, 5,120 tokens" in describe_time(make())
    assert "unknown: the data is not there yet" in describe_time(make(steps=None))


@pytest.mark.parametrize(
    ("flags", "precision"),
    [({"avx2": True}, "32-true"), ({"avx512_bf16": True}, "bf16-mixed")],
)
def test_the_precision_follows_from_the_processor(monkeypatch, flags, precision):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: flags)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert suggested_precision() == precision
    assert precision in describe_time(make())


def test_a_model_of_nested_options_is_read():
    scaling = "{rope_type: yarn, factor: 4.0, original_max_len: 512}"
    read = read_plan([SEQ, f"--model.init_args.model.rope_scaling={scaling}"])
    assert read.config.rope_scaling is not None
    assert read.config.rope_scaling.factor == 4


def test_bad_options_end_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        main([SEQ, "--model.init_args.model.dimm=3"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "dimm" in error


def test_rows_longer_than_the_context_are_refused():
    with pytest.raises(ValueError, match="window_size 4096 exceeds the model's max_len 1024"):
        read_plan([SEQ, "--data.init_args.window_size=4096"])


def test_a_run_that_was_not_trained_yet_is_named(tmp_path):
    last = tmp_path / "seq" / "checkpoints" / "last"
    options = ["--model.init_args.model=null", f"--model.init_args.init_from={last}"]
    with pytest.raises(ValueError, match="seq has no checkpoint yet; train that run first"):
        read_plan([SEQ, *options])


def test_what_cannot_fit_exits_with_1(capsys, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda: 10**6)
    with pytest.raises(SystemExit) as end:
        main([SEQ])
    assert end.value.code == 1
    captured = capsys.readouterr()
    assert "parameters" in captured.out
    assert "cannot train the model" in captured.err
