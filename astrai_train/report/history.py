"""What a run's folder remembers: its metrics, its samples and its configuration."""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CONFIG = "config.yaml"
METRICS = "metrics.csv"
SAMPLES = "samples.jsonl"
FINISHED = "finished.json"

Points = list[tuple[float, float]]
"""Optimizer steps done and a value, in the order of steps."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the model made of one prompt on the way."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class History:
    """One run.

    Raises:
        ValueError: a file of the folder is damaged; the message names it.
    """

    folder: Path
    series: dict[str, Points] = field(default_factory=dict)
    """Each logged metric by its name, as `train/loss`."""
    samples: list[Sample] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "History":
        """Read a run's folder; what is not there yet is empty."""
        config: object = {}
        if (folder / CONFIG).is_file():
            config = yaml.safe_load((folder / CONFIG).read_text("utf-8"))
            if not isinstance(config, dict):
                raise ValueError(f"{folder / CONFIG} is not a mapping")
        return cls(
            folder=folder,
            series=_series(folder / METRICS) if (folder / METRICS).is_file() else {},
            samples=read_samples(folder / SAMPLES) if (folder / SAMPLES).is_file() else [],
            config=config,
        )

    @property
    def objective(self) -> str:
        """Name of the module's class, as `SFTModule`; empty where no configuration tells."""
        model = self.config.get("model") or {}
        return str(model.get("class_path", "")).rpartition(".")[2]

    @property
    def last_step(self) -> int:
        """Optimizer steps that the newest logged value has behind it; 0 before the first one."""
        return max((int(points[-1][0]) for points in self.series.values()), default=0)


def _series(file: Path) -> dict[str, Points]:
    series: dict[str, Points] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            step = row.pop("step", None)
            if not (step or "").isdigit():
                continue  # the last line can be cut off
            for name, text in row.items():
                if name and text and name != "epoch":
                    # the logger counts from 0: a row carries the steps done before its own
                    series.setdefault(name, []).append((int(step or 0) + 1, _number(text, file)))
    return series


def _number(text: str, file: Path) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{file} holds {text!r} where a number should be") from error


def read_samples(file: Path) -> list[Sample]:
    """Read `samples.jsonl`; half a line at its end, which a killed run leaves, is skipped.

    Raises:
        ValueError: another line is damaged; the message names it.
    """
    samples: list[Sample] = []
    lines = file.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            samples.append(Sample(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            if number == len(lines):
                break  # a killed run leaves half a line
            raise ValueError(f"{file} line {number} is not a sample ({error})") from error
    return samples


def thinned(points: Points, most: int) -> Points:
    """At most so many points, each the mean of its neighbours, so that a line stays readable."""
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) <= most:
        return finite
    size = math.ceil(len(finite) / most)
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
