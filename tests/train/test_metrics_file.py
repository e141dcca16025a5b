import csv
from pathlib import Path

from astrai_train.metrics_file import MetricsFile


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def log(folder: Path, *entries: tuple[int, dict[str, float]]) -> None:
    logger = MetricsFile(folder)
    for step, metrics in entries:
        logger.log_metrics(dict(metrics), step)
    logger.save()


def test_another_process_goes_on_with_the_file(tmp_path):
    log(tmp_path, (0, {"loss": 3.0}), (1, {"loss": 2.0}))
    log(tmp_path, (2, {"loss": 1.0}), (2, {"val/loss": 1.5}))
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "2"]
    assert [row["val/loss"] for row in rows(tmp_path)] == ["", "", "", "1.5"]


def test_rows_that_a_resumed_run_writes_again_are_dropped(tmp_path):
    log(tmp_path, *((step, {"loss": float(step)}) for step in range(6)))
    MetricsFile(tmp_path).rewind(4, repeats_validation=False)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3"]


def test_a_validation_to_be_repeated_is_dropped_and_its_step_kept(tmp_path):
    entries = [(2, {"loss": 1.0}), (2, {"val/loss": 1.5}), (3, {"loss": 0.5}), (3, {"val/loss": 2})]
    log(tmp_path, *entries)
    MetricsFile(tmp_path).rewind(4, repeats_validation=True)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        ("2", "1.0"),
        ("2", ""),
        ("3", "0.5"),
    ]


def test_nothing_to_rewind_is_no_error(tmp_path):
    MetricsFile(tmp_path).rewind(4, repeats_validation=True)
    assert not (tmp_path / "metrics.csv").exists()
