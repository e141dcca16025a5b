"""`astrai-train lr-find`: how high a learning rate a run bears, tried on its own first steps.

The rate grows by the same factor from step to step (arXiv 1506.01186) until the loss leaves;
nothing is saved but `lr_find.html` and `lr_find.json`. Where the optimizer has several rates,
Muon's and AdamW's, all grow alike and the first one is told.
"""

import json
import math
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NoReturn

from astrai_core.command_line import CommandLineError
from astrai_train.callbacks.sweep import Sweep, smoothed
from astrai_train.option_errors import explain
from astrai_train.report.chart import line_chart
from astrai_train.run import Run

PAGE = "lr_find.html"
FIGURES = "lr_find.json"
_PROGRAM = "astrai-train lr-find"
_STEPS, _LOWEST, _HIGHEST = 100, 1e-3, 1e2
_OPTIONS = {"--steps": int, "--lowest": float, "--highest": float}
_TEMPLATE = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Learning rates</title>
<style>
:root { color-scheme: light dark; --line-0: #9aa2ad; --line-1: #2563eb; }
body { max-width: 760px; margin: 32px auto; padding: 0 16px; font: 15px/1.5 sans-serif; }
.grid { stroke: #8884; } .tick { font-size: 12px; fill: #888; }
.line { fill: none; stroke-width: 2; }
</style>
<h1>Loss over the learning rate</h1>CHART<p>TEXT</p></html>
"""
_USAGE = f"""\
usage: {_PROGRAM} --config FILE [--steps N] [--lowest X] [--highest X] [options of fit]

  --steps N     optimizer steps of the sweep (default {_STEPS})
  --lowest X    first rate, as a multiple of the configured one (default {_LOWEST:g})
  --highest X   last rate, as a multiple of the configured one (default {_HIGHEST:g})
"""


def main(arguments: Sequence[str]) -> None:
    """Sweep, write the page and print the reading.

    Args:
        arguments: options of `astrai-train fit`, and those of the sweep.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        sys.exit(0 if arguments else 2)
    try:
        given, rest = _own_options(arguments)
        steps = int(given.get("--steps", _STEPS))
        sweep = Sweep(steps, given.get("--lowest", _LOWEST), given.get("--highest", _HIGHEST))
        run = _run(rest, sweep)
    except (ArgumentError, CommandLineError, ValueError) as error:
        _fail(explain(str(error)), 2)
    try:
        run.execute()
        page = write(run.folder, sweep)
    except (OSError, ValueError) as error:
        _fail(str(error), 1)
    sys.stdout.write(f"{_PROGRAM}: {describe(sweep)}\n{_PROGRAM}: plot: {page}\n")


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the smoothed loss falls fastest over the logarithm of the rate.

    Returns:
        None where the loss never falls, or too few steps were done to say.
    """
    pairs = [(r, s) for r, s in zip(rates, smoothed(losses), strict=False) if math.isfinite(s)]
    if len(pairs) < 5:
        return None
    # over five points, so that one step's luck does not decide
    slopes = [
        (pairs[i + 2][1] - pairs[i - 2][1])
        / (math.log(pairs[i + 2][0]) - math.log(pairs[i - 2][0]))
        for i in range(2, len(pairs) - 2)
    ]
    steepest = min(slopes)
    return None if steepest >= 0 else pairs[slopes.index(steepest) + 2][0]


def describe(sweep: Sweep) -> str:
    """Say what the sweep found."""
    found = suggest(sweep.rates, sweep.losses)
    if found is None:
        return "the loss fell at no rate: try other bounds, or more --steps"
    best = min(range(len(sweep.losses)), key=lambda index: smoothed(sweep.losses)[index])
    return (
        f"the loss falls fastest at lr {found:.2g} and is lowest at {sweep.rates[best]:.2g}; "
        "a peak between the two is a good first try"
    )


def write(folder: Path, sweep: Sweep) -> Path:
    """Write the plot and its figures and return the plot's path."""
    folder.mkdir(parents=True, exist_ok=True)
    finite = [(r, v) for r, v in zip(sweep.rates, sweep.losses, strict=False) if math.isfinite(v)]
    figures = {
        "suggestion": suggest(sweep.rates, sweep.losses),
        "lr": [rate for rate, _ in finite],
        "loss": [loss for _, loss in finite],
        "smoothed": smoothed([loss for _, loss in finite]),
    }
    (folder / FIGURES).write_text(json.dumps(figures) + "\n", encoding="utf-8")
    lines = {
        name: [(math.log10(rate), value) for (rate, _), value in zip(finite, values, strict=True)]
        for name, values in (("loss", figures["loss"]), ("smoothed", figures["smoothed"]))
    }
    chart = line_chart(lines, "lr", lambda exponent: f"{10**exponent:.2g}")
    page = (_TEMPLATE.replace("CHART", chart)).replace("TEXT", escape(describe(sweep)))
    (folder / PAGE).write_text(page, encoding="utf-8")
    return folder / PAGE


def _own_options(arguments: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Take the sweep's options out of a command line.

    Raises:
        CommandLineError: one has no value, or a wrong one.
    """
    given: dict[str, float] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _OPTIONS:
            rest.append(word)
            continue
        text = value if equals else next(words, "")
        try:
            given[name] = _OPTIONS[name](text)
        except ValueError as error:
            raise CommandLineError(f"{name} needs a number, not {text!r}") from error
        if not given[name] > 0 or (name == "--steps" and given[name] < 10):
            least = "10 or more" if name == "--steps" else "above 0"
            raise CommandLineError(f"{name} must be {least}, not {text}")
    if given.get("--lowest", _LOWEST) >= given.get("--highest", _HIGHEST):
        raise CommandLineError("--lowest must be below --highest")
    return given, rest


def _run(options: Sequence[str], sweep: Sweep) -> Run:
    """A dry run of the same training: no checkpoint, no metrics, no earlier run touched."""
    dry = ["--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
    run = Run(["fit", *options, *dry, f"--trainer.fast_dev_run={sweep.steps}"])
    batches = sweep.steps * run.trainer.accumulate_grad_batches
    run.trainer.limit_train_batches = batches
    run.trainer.callbacks.insert(0, sweep)  # pyright: ignore[reportAttributeAccessIssue]
    return run


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{_PROGRAM}: {' '.join(message.split())}\n")
    sys.exit(status)
