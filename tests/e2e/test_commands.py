"""`validate`, `test` and `predict` of all four objectives, through the command."""

import json

import pytest

from astrai_train.cli import main

from .test_resume import HERE, World


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def run(world, monkeypatch, capsys):
    """Run a command on the data of its objective and return what it printed."""
    monkeypatch.syspath_prepend(str(HERE))

    def run(command: str, objective: str) -> str:
        folder, data = world.folder / f"{objective}-{command}", f"{objective}.jsonl"
        main(
            [
                *(command, "--config", str(world.config(objective))),
                *("--trainer.default_root_dir", str(folder)),
                *("--data.init_args.test", str(world.folder / data)),
                *("--data.init_args.predict", str(world.folder / data)),
                *("--trainer.limit_test_batches", "2", "--trainer.limit_predict_batches", "3"),
            ]
        )
        return capsys.readouterr().out

    return run


METRICS = {"SEQ": "bpb", "SFT": "loss", "DPO": "logps/chosen", "GRPO": "reward"}
KEYS = {"SEQ": "nll", "SFT": "nll", "DPO": "margin", "GRPO": "completion"}


@pytest.mark.parametrize("objective", METRICS)
def test_validate_and_test_measure_the_same_on_the_same_data(run, objective):
    val, test = run("validate", objective), run("test", objective)
    name = METRICS[objective]
    assert number(val, f"val/{name}") == number(test, f"test/{name}")


def number(output: str, name: str) -> float:
    """Return a metric from Lightning's table."""
    (line,) = (line for line in output.splitlines() if f" {name} " in line)
    return float(line.split()[-2])


@pytest.mark.parametrize("objective", METRICS)
def test_predict_writes_a_line_for_each_sample(run, world, objective):
    assert "predictions" in run("predict", objective)
    file = world.folder / f"{objective}-predict" / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert len(lines) >= 6
    assert all(KEYS[objective] in line for line in lines)
