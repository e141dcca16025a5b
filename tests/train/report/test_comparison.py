import re

import pytest

from astrai_train.cli import main
from astrai_train.report import History
from astrai_train.report.comparison import Comparison, Row, flattened, short_names


def make_run(folder, lr, rows, speed="100"):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "model:\n  class_path: astrai_train.modules.SFTModule\n"
        f"  init_args: {{optimizer: {{lr: {lr}}}}}\n"
        f"trainer: {{default_root_dir: {folder}, max_steps: 30}}\n"
    )
    header = "epoch,step,train/loss,val/loss,train/tokens_per_s\n"
    (folder / "metrics.csv").write_text(header + "".join(f"0,{row},{speed}\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    first = make_run(tmp_path / "a/sft", 0.1, ["9,2.5,3.0", "19,1.5,2.0", "29,1.75,2.5"])
    second = make_run(tmp_path / "b/sft", 0.3, ["9,2.5,2.25", "19,nan,nan"], speed="150")
    return first, second


def test_the_least_loss_and_the_median_speed_stand_for_a_run(runs):
    rows = Comparison([History.of(folder) for folder in runs]).figures()
    assert rows[:2] == [
        Row("objective", ("SFTModule", "SFTModule")),
        Row("steps", ("30", "20")),
    ]
    assert Row("val/loss (least)", ("2", "2.25"), best=0) in rows
    assert Row("train/loss (least)", ("1.5", "2.5"), best=0) in rows
    assert Row("train/tokens_per_s (median)", ("100", "150"), best=1) in rows
    assert len(rows) == 5


def test_only_settings_that_differ_are_told_and_folders_are_none(runs):
    rows = Comparison([History.of(folder) for folder in runs]).settings()
    assert rows == [Row("model.init_args.optimizer.lr", ("0.1", "0.3"))]


def test_names_are_as_short_as_they_may_be(runs, tmp_path):
    assert short_names(runs) == ["a/sft", "b/sft"]
    assert short_names([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    assert flattened({"a": {"b": [1, 2], "c": {}}, "d": None}) == {
        "a.b": "[1, 2]",
        "a.c": "{}",
        "d": "null",
    }


def test_a_run_keeps_its_colour_where_another_has_no_such_metric(runs, tmp_path):
    third = make_run(tmp_path / "c", 0.1, [])
    (third / "metrics.csv").write_text("step,reward\n9,0.5\n")
    page = Comparison([History.of(folder) for folder in (*runs, third)]).page()
    reward = page[page.index("<h3>reward</h3>") :]
    assert "stroke:var(--line-2)" in reward[: reward.index("</svg>")]
    assert not re.search(r"<script|(src|href)=|@import|url\(", page)


def test_the_command_prints_and_writes(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["compare", *map(str, runs)])
    out = capsys.readouterr().out
    assert "model.init_args.optimizer.lr" in out
    assert "2.25" in out
    assert (tmp_path / "comparison.html").read_text("utf-8").count("<svg") == 3
    for wrong, message in (
        ([str(runs[0]), str(runs[0])], "two different runs or more"),
        ([str(runs[0]), str(tmp_path)], "it is not the folder of a run"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["compare", *wrong])
        assert exit_info.value.code == 1
        assert message in capsys.readouterr().err
