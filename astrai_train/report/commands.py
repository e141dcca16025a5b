"""`astrai-train report`, `compare` and `watch`: what runs were, and how one goes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from astrai_core.command_line import CommandLineError
from astrai_train.report.comparison import Comparison, Row
from astrai_train.report.history import CONFIG, METRICS, History
from astrai_train.report.page import write_report

_PROGRAM = "astrai-train"
_PAGE = "comparison.html"


def report(options: Sequence[str]) -> None:
    """Write the page of a run, as fit does at its end.

    Raises:
        CommandLineError: the folder is not a run's.
        OSError: the folder cannot be written to.
        ValueError: a file of the run is damaged.
    """
    parser = _parser("report", report)
    parser.add_argument("folder", type=Path, help="trainer.default_root_dir of a run")
    _say(f"report: {write_report(_run(parser.parse_args(options).folder))}")


def compare(options: Sequence[str]) -> None:
    """Put runs side by side: figures, settings that differ, and a page with their curves.

    Raises:
        CommandLineError: a folder is not a run's, or there are not two.
        OSError: the page cannot be written.
        ValueError: a file of a run is damaged.
    """
    parser = _parser("compare", compare)
    parser.add_argument("folder", type=Path, nargs="+", help="folders of two or more runs")
    parser.add_argument("--out", type=Path, default=Path(_PAGE), help="the page (%(default)s)")
    given = parser.parse_args(options)
    folders = list({folder.resolve(): _run(folder) for folder in given.folder}.values())
    if len(folders) < 2:
        raise CommandLineError("compare needs the folders of two different runs or more")
    comparison = Comparison([History.of(folder) for folder in folders])
    console = Console(soft_wrap=False)
    for title, rows in (
        ("figures", comparison.figures()),
        ("settings that differ", comparison.settings()),
    ):
        if rows:
            console.print(_table(title, comparison.names, rows))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(comparison.page(), "utf-8")
    _say(f"page: {given.out}")


def watch(options: Sequence[str]) -> None:
    """Serve a live page of a run until Ctrl-C.

    Raises:
        CommandLineError: the folder is not a run's, or the port is taken.
    """
    from astrai_train.report.watch import WatchedRun, WatchServer

    parser = _parser("watch", watch)
    parser.add_argument("folder", type=Path, help="trainer.default_root_dir of a run")
    parser.add_argument("--port", type=int, default=0, help="of this machine; 0 takes a free one")
    given = parser.parse_args(options)
    folder = _run(given.folder)
    try:
        server = WatchServer(WatchedRun(folder), given.port)
    except (OSError, OverflowError) as error:
        raise CommandLineError(
            f"--port {given.port}: {error}; leave it out for a free one"
        ) from None
    with server:
        _say(f"watching {folder}: {server.url} (Ctrl-C ends it)")
        server.serve_forever()


def _parser(name: str, command: Callable[[Sequence[str]], None]) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"{_PROGRAM} {name}",
        description=(command.__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )


def _run(folder: Path) -> Path:
    if not folder.is_dir():
        raise CommandLineError(f"{folder} is not a folder")
    if not any((folder / name).is_file() for name in (CONFIG, METRICS)):
        raise CommandLineError(f"{folder} has no {METRICS}: it is not the folder of a run")
    return folder


def _table(title: str, names: Sequence[str], rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        cells = [
            f"[bold]{cell}[/bold]" if index == row.best else cell.replace("[", r"\[")
            for index, cell in enumerate(row.cells)
        ]
        table.add_row(row.name, *cells)
    return table


def _say(text: str) -> None:
    sys.stdout.write(f"{_PROGRAM}: {text}\n")
    sys.stdout.flush()
