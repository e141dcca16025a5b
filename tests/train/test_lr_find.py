import json
import math

import pytest
import torch

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.callbacks.sweep import smoothed
from astrai_train.lr_find import main, suggest


def test_the_running_mean_has_no_bias_of_its_start():
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 2.0])[1] == pytest.approx((0.8 * 0.2 * 1 + 0.2 * 2) / (1 - 0.64))


def test_the_suggestion_is_where_the_loss_falls_fastest():
    rates = [10 ** (-4 + step / 20) for step in range(81)]
    # falls around 1e-2, and leaves above 0.3
    losses = [
        4 - 3 / (1 + math.exp(-4 * (math.log10(rate) + 2))) + (rate / 0.5) ** 4 for rate in rates
    ]
    found = suggest(rates, losses)
    assert found == pytest.approx(0.01, rel=0.7)  # the running mean lags a few points behind
    assert suggest(rates, [1.0 + step for step in range(81)]) is None
    assert suggest(rates[:4], [4.0, 3.0, 2.0, 1.0]) is None


@pytest.fixture
def world(tmp_path):
    text = "the quick brown fox jumps over the lazy dog 敏捷的棕色狐狸"
    AutoTokenizer.train([text], 300).save_pretrained(tmp_path / "tokenizer")
    lines = [json.dumps({"text": f"{text} {number}"}) for number in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.accumulate_grad_batches=2",
        "--model.class_path=SEQModule",
        "--model.init_args.model={vocab_size: 300, dim: 16, n_layers: 1, n_heads: 2, dim_ffn: 16}",
        "--model.init_args.compile=false",
        "--model.init_args.schedule.warmup_steps=0",
        "--data.class_path=TokenDataModule",
        f"--data.init_args.tokenizer={tmp_path / 'tokenizer'}",
        f"--data.init_args.train={tmp_path / 'text.jsonl'}",
        f"--data.init_args.val={tmp_path / 'text.jsonl'}",
        "--data.init_args.window_size=32",
        "--data.init_args.batch_size=2",
    ]


def test_a_sweep_writes_its_plot_and_nothing_else(world, tmp_path, capsys):
    torch.manual_seed(0)
    main([*world, "--steps", "12", "--lowest=0.1", "--highest=100"])
    said = capsys.readouterr().out
    assert f"plot: {tmp_path / 'run' / 'lr_find.html'}" in said
    figures = json.loads((tmp_path / "run" / "lr_find.json").read_text())
    assert figures["lr"][:2] == pytest.approx([1e-4, 1e-4 * 1000 ** (1 / 11)])
    assert len(figures["lr"]) == len(figures["loss"]) <= 12
    assert figures["loss"][0] == pytest.approx(math.log(300), rel=0.05)  # one loss a step, whole
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "lr_find.html",
        "lr_find.json",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "many"], "--steps needs a number, not 'many'"),
        (["--steps=3"], "--steps must be 10 or more, not 3"),
        (["--lowest=2", "--highest=1"], "--lowest must be below --highest"),
        (["--model.init_args.optimizer.lrr=1"], "lrr"),
    ],
)
def test_a_wrong_option_is_named(world, options, message, capsys):
    with pytest.raises(SystemExit) as end:
        main([*world, *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
