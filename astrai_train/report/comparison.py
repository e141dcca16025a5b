"""Runs side by side: their figures, the settings in which they differ, and their curves."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from astrai_train.report.chart import line_chart, number
from astrai_train.report.history import History, Points
from astrai_train.report.page import TEMPLATES, TITLES

_LEAST = ("loss", "nll", "bpb", "ppl")
_MIDDLE = ("tokens_per_s",)
# they say where a run is and when it writes, not what it is
_PLACES = ("trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.logger")
_ABSENT = "-"


@dataclass(frozen=True)
class Row:
    """One figure or setting of every run, in the order of the runs."""

    name: str
    cells: tuple[str, ...]
    best: int | None = None
    """Which run has the best value, where that can be said and they differ."""


@dataclass(frozen=True)
class Comparison:
    """What sets runs apart.

    Args:
        runs: two or more of them.
    """

    runs: Sequence[History]

    @property
    def names(self) -> list[str]:
        """A short name for each run: the end of its folder's path that tells it from the others."""
        return short_names([run.folder for run in self.runs])

    def figures(self) -> list[Row]:
        """Objective, steps and every metric that a run has logged.

        Of losses the least, of speeds the median, of anything else the last value is told.
        """
        rows = [
            Row("objective", tuple(run.objective or _ABSENT for run in self.runs)),
            Row("steps", tuple(f"{run.last_step:,}" for run in self.runs)),
        ]
        for metric in self._metrics():
            figure = _figure(metric)
            values = [_value(metric, run.series.get(metric, [])) for run in self.runs]
            known = [value for value in values if value is not None]
            best = None
            if figure != "last" and len(known) > 1 and min(known) != max(known):
                best = values.index(min(known) if figure == "least" else max(known))
            cells = tuple(_ABSENT if value is None else number(value) for value in values)
            rows.append(Row(f"{metric} ({figure})", cells, best))
        return rows

    def settings(self) -> list[Row]:
        """Every setting that is not the same in all runs, by its dotted name."""
        flat = [flattened(run.config) for run in self.runs]
        keys = sorted({key for config in flat for key in config if not key.startswith(_PLACES)})
        rows = (Row(key, tuple(config.get(key, _ABSENT) for config in flat)) for key in keys)
        return [row for row in rows if len(set(row.cells)) > 1]

    def page(self) -> str:
        """All of it as one HTML page that needs nothing else."""
        return TEMPLATES.get_template("comparison.html.jinja").render(
            names=self.names,
            folders=[str(run.folder) for run in self.runs],
            figures=self.figures(),
            settings=self.settings(),
            charts=list(self._charts()),
        )

    def _metrics(self) -> list[str]:
        known = {metric for run in self.runs for metric in run.series}
        order = list(TITLES)

        def place(metric: str) -> tuple[int, str, bool]:
            name = metric.rpartition("/")[2]
            return (
                order.index(name) if name in order else len(order),
                name,
                metric.startswith("train/"),
            )

        return sorted(known, key=place)

    def _charts(self) -> Iterable[tuple[str, Markup]]:
        for metric in self._metrics():
            # a run without this metric keeps its place, and so its colour
            lines = {
                name: run.series.get(metric, [])
                for name, run in zip(self.names, self.runs, strict=True)
            }
            svg = line_chart(lines)
            if svg:
                split, _, name = metric.rpartition("/")
                title = TITLES.get(name, name)
                yield (f"{title}, {split}" if split else title), Markup(svg)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The least number of last parts of each path that keeps all of them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    else:
        names = [str(folder) for folder in folders]
    return names


def flattened(config: object, prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted names and short texts."""
    if isinstance(config, Mapping) and config:
        flat: dict[str, str] = {}
        for key, value in config.items():
            flat |= flattened(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: "null" if config is None else str(config)}


def _value(metric: str, points: Points) -> float | None:
    """The figure that stands for a whole curve; None where it has no finite value."""
    values = [value for _, value in points if math.isfinite(value)]
    if not values:
        return None
    return {"least": min, "median": statistics.median}.get(_figure(metric), _last)(values)


def _last(values: Sequence[float]) -> float:
    return values[-1]


def _figure(metric: str) -> str:
    name = metric.rpartition("/")[2]
    if name in _LEAST:
        return "least"
    return "median" if name in _MIDDLE else "last"
