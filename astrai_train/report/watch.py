"""A live page of a run: its report, drawn anew whenever the run has written something.

The server is Python's own, for one person on this machine: it listens on the loopback alone,
answers no other Host (a page elsewhere could otherwise read it through a name of its own), and
reads nothing but the run's folder.
"""

import json
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any

from astrai_train.pace import Pace
from astrai_train.report.history import CONFIG, FINISHED, METRICS, SAMPLES, History
from astrai_train.report.page import TEMPLATES, facts_of, render
from astrai_train.wording import duration, place

_SILENT_SECONDS = 120.0
_NAMES = ("127.0.0.1", "localhost")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class WatchedRun:
    """A run as it stands now; threads may share it.

    Args:
        folder: the run's.
        clock: seconds since 1970, as the times of files are.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._clock = clock
        self._lock = Lock()
        self._version: str | None = None
        self._report = ""
        self._step = 0
        self._total: int | None = None
        self._pace = Pace()
        self._written = 0.0

    def state(self, known: str | None = None) -> dict[str, Any]:
        """What the page shows.

        Args:
            known: the version that the page has.

        Returns:
            `version`; `share` of the run done, None where nothing limits it; `text`, a line on
            where it stands; and where `version` is not `known`, `report` in HTML.
        """
        with self._lock:
            problem = self._refresh()
            state = {"version": self._version, "share": self._share(), "text": self._text()}
            if problem:
                state["text"] = f"{state['text']} ({problem})"
            return state if known == self._version else {**state, "report": self._report}

    def _refresh(self) -> str | None:
        """Draw what is new; say what is wrong, which passes where a file was half written."""
        paths = [self.folder / name for name in (CONFIG, METRICS, SAMPLES, FINISHED)]
        states = [path.stat() for path in paths if path.is_file()]
        version = "-".join(f"{state.st_mtime_ns:x}.{state.st_size:x}" for state in states)
        if version == self._version:
            return None
        written = self._last_written()
        try:
            history = History.of(self.folder)
            # a file that has grown while it was read tells the moment of no step
            is_settled = self._last_written() == written
            report = render(history, facts_of(history), "run.html.jinja")
        except ValueError as error:
            return str(error)
        self._version, self._report = version, report
        steps = (history.config.get("trainer") or {}).get("max_steps")
        self._total = steps if isinstance(steps, int) and steps > 0 else None
        self._step = history.last_step
        self._written = written
        if self._step and is_settled:
            # the newest line was written when its step was done
            self._pace.record(self._step, written)
        return None

    def _last_written(self) -> float:
        metrics = self.folder / METRICS
        return metrics.stat().st_mtime if metrics.is_file() else 0.0

    @property
    def _is_finished(self) -> bool:
        return (self.folder / FINISHED).is_file()

    def _share(self) -> float | None:
        if self._is_finished:
            return 1.0
        return min(1.0, self._step / self._total) if self._total else None

    def _text(self) -> str:
        if self._is_finished:
            return f"finished after {self._step:,} steps"
        if not self._step:
            return "no step is logged yet"
        parts = [place(self._step, self._total)]
        now = self._clock()
        left = self._pace.seconds_left(self._total, now) if self._total else None
        if now - self._written > max(_SILENT_SECONDS, 3 * self._pace.last_gap):
            silent = duration(now - self._written)
            parts.append(f"nothing new for {silent}: it may have been stopped")
        elif left is not None and self._step < (self._total or 0):
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)


class WatchServer(ThreadingHTTPServer):
    """Serves the page of one run on the loopback.

    Args:
        run: what to show.
        port: where; 0 lets the system choose.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, run: WatchedRun, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.run = run

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    timeout = 30  # of a connection that says nothing

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, WatchServer)
        host, _, port = self.headers.get("Host", "").partition(":")
        if host not in _NAMES or port not in ("", str(server.server_port)):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "this page is for this machine alone")
            return
        path, _, query = self.path.partition("?")
        match path:
            case "/":
                page = TEMPLATES.get_template("watch.html.jinja")
                text = page.render(run=server.run.folder)
                self._answer(HTTPStatus.OK, "text/html", text)
            case "/watch.js":
                script = files("astrai_train.report").joinpath("watch.js").read_text("utf-8")
                self._answer(HTTPStatus.OK, "text/javascript", script)
            case "/state":
                state = server.run.state(query or None)
                self._answer(HTTPStatus.OK, "application/json", json.dumps(state))
            case _:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is nothing here")

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the parent's name
        """Say nothing of each request."""
