"""A run's history as one page that needs nothing else, and as JSON."""

import json
import math
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from astrai_train.report.chart import line_chart, number
from astrai_train.report.history import History, Points
from astrai_train.report.machine import machine, versions

TEMPLATES = Environment(
    loader=PackageLoader("astrai_train", "report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals["number"] = number
REPORT = "report.html"
FIGURES = "report.json"
_SPLITS = ("train", "val", "test")
TITLES = {
    "loss": "Loss (nats)",
    "nll": "Negative log-likelihood (nats a token)",
    "bpb": "Bits per byte",
    "ppl": "Perplexity",
    "lr": "Learning rate",
    "tokens_per_s": "Tokens a second",
    "grad_norm": "Norm of the gradient",
}


def write_report(folder: Path, stopped: str | None = None) -> Path:
    """Write `report.html` and `report.json` into a run's folder and return the page's path.

    Args:
        folder: the run's.
        stopped: why the run ended early; None where it ran to its end.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: a file of the run is damaged; the message names it.
    """
    history = History.of(folder)
    facts = facts_of(history, stopped)
    _replace(folder / FIGURES, json.dumps(_finite(facts), indent=1, ensure_ascii=False) + "\n")
    _replace(folder / REPORT, render(history, facts))
    return folder / REPORT


def render(history: History, facts: dict[str, Any], page: str = "page.html.jinja") -> str:
    """Return the page; `facts` is what the JSON holds."""
    return TEMPLATES.get_template(page).render(
        facts=facts,
        charts=[(title, names, Markup(svg)) for title, names, svg in _charts(history)],
        samples=_by_prompt(history),
        config=yaml.safe_dump(history.config, sort_keys=False, allow_unicode=True),
    )


def facts_of(history: History, stopped: str | None = None) -> dict[str, Any]:
    """What a run was and came to, ready for JSON but for what is not finite."""
    return {
        "run": str(history.folder),
        "objective": history.objective,
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        "steps": history.last_step,
        "stopped": stopped,
        "last": {name: points[-1][1] for name, points in history.series.items()},
        "best": {
            name: min(value for _, value in points)
            for name, points in history.series.items()
            if name.endswith(("/loss", "/bpb"))
        },
        "machine": machine(),
        "versions": versions(),
        "series": history.series,
        "samples": [vars(sample) for sample in history.samples],
        "config": history.config,
    }


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON; they become null."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _charts(history: History) -> Iterable[tuple[str, list[str], str]]:
    """Title, names of lines and drawing; a metric's splits share a chart."""
    groups: dict[str, dict[str, Points]] = {}
    for name, points in history.series.items():
        split, slash, metric = name.partition("/")
        groups.setdefault(metric if slash and split in _SPLITS else name, {})[name] = points
    order = [name for name in TITLES if name in groups]
    for metric in [*order, *sorted(groups.keys() - TITLES.keys())]:
        lines = dict(sorted(groups[metric].items()))
        svg = line_chart(lines)
        if svg:
            yield TITLES.get(metric, metric), list(lines), svg


def _by_prompt(history: History) -> dict[str, list[tuple[str, str]]]:
    """What became of each prompt, and at which steps; an answer that stays is told once."""
    told: dict[str, list[tuple[int, int, str]]] = {}
    for sample in history.samples:
        answers = told.setdefault(sample.prompt, [])
        first = sample.step
        if answers and answers[-1][2] == sample.text:
            first = answers.pop()[0]
        answers.append((first, sample.step, sample.text))
    return {
        prompt: [
            (f"step {first:,}" if first == last else f"steps {first:,} to {last:,}", text)
            for first, last, text in answers
        ]
        for prompt, answers in told.items()
    }


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)  # noqa: PTH105 - a reader sees the old page or the new one
