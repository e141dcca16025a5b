"""`metrics.csv` of a run: one file, whatever interrupted the run."""

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from astrai_train.report.history import METRICS

_VALIDATION = "val"


class MetricsFile(CSVLogger):
    """Lightning's CSV logger, which goes on with the file that is there.

    Args:
        folder: the run's; `metrics.csv` is in it.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, name="", version="")

    @property
    def log_dir(self) -> str:
        """The run's folder."""
        return str(self.save_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _Continued(self.log_dir)
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment

    def begin_anew(self) -> None:
        """Drop what an earlier run has written, its column names included."""
        (Path(self.log_dir) / METRICS).unlink(missing_ok=True)
        self._experiment = None

    def rewind(self, step: int, repeats_validation: bool) -> None:
        """Drop rows that a run resumed at this step will write again.

        Args:
            step: optimizer steps done; rows carry the steps done before theirs.
            repeats_validation: the resumed run begins with the validation after this step.
        """
        file = Path(self.log_dir) / METRICS
        if not file.is_file():
            return
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            names = list(reader.fieldnames or [])
            rows = [row for row in reader if _is_kept(row, step, repeats_validation)]
        with file.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, names)
            writer.writeheader()
            writer.writerows(rows)


class _Continued(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Take the header over instead of deleting the file."""
        file = Path(self.metrics_file_path)
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as lines:
                self.metrics_keys = list(csv.DictReader(lines).fieldnames or [])


def _is_kept(row: dict[str, str | None], step: int, repeats_validation: bool) -> bool:
    text = row.get("step") or ""
    if not text.isdigit() or int(text) >= step:
        return False
    is_validation = any(name.startswith(_VALIDATION) and value for name, value in row.items())
    return not (repeats_validation and is_validation and int(text) == step - 1)
