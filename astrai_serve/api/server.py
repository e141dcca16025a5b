"""The process side of serving: the signals, the end.

Ctrl-C ends everything at once: clients that still read get an error in their stream, and the
process exits with 0, for that is how one ends a server. SIGTERM takes no new work, gives the
answers under way some seconds, then does the same. A second signal does not wait.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from astrai_serve.api.app import create_app
from astrai_serve.api.backend import Engine
from astrai_serve.api.settings import ServerSettings
from astrai_serve.api.shutdown import Shutdown

# for clients to take their last event, and for a step under way to end
_LAST_SECONDS = 2


class _Server(uvicorn.Server):
    """Uvicorn with our way of stopping."""

    def __init__(
        self,
        config: uvicorn.Config,
        shutdown: Shutdown,
        drain_seconds: float,
        on_ready: Callable[[], None],
    ):
        super().__init__(config)
        self._shutdown = shutdown
        self._drain_seconds = drain_seconds
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Uvicorn would note the signal and raise it again at the end; our exit is a clean one."""
        if self._loop is None or self._shutdown.interrupted:
            self._force()
        elif sig == signal.SIGTERM and not self.should_exit:
            self._loop.call_soon_threadsafe(self._drain)
        else:
            self.config.timeout_graceful_shutdown = _LAST_SECONDS
            self._loop.call_soon_threadsafe(self._interrupt)
        self.should_exit = True

    def _drain(self) -> None:
        assert self._loop is not None
        self._shutdown.drain()
        self._loop.call_later(self._drain_seconds, self._interrupt)

    def _interrupt(self) -> None:
        assert self._loop is not None
        self._shutdown.interrupt()
        self._loop.call_later(_LAST_SECONDS, self._force)

    def _force(self) -> None:
        # uvicorn then cancels the lifespan, and would log that as a failure of the application
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.force_exit = True


def run_server(
    engine: Engine,
    settings: ServerSettings,
    listener: socket.socket,
    *,
    drain_seconds: float = 10.0,
    tls: tuple[Path, Path | None] | None = None,
    before_ready: Callable[[], object] | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal comes, then close the engine.

    Args:
        engine: generates.
        settings: names, limits and who may ask.
        listener: a bound socket.
        drain_seconds: after SIGTERM, answers under way may go on for so long.
        tls: files of a certificate with its chain, and of its key, in PEM.
        before_ready: called when all is built, before clients can connect; what it raises ends it.
        on_ready: called when clients can connect.
    """
    shutdown = Shutdown()
    certificate, key = tls or (None, None)
    app = create_app(engine, settings, shutdown)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # RequestLog tells more
        ssl_certfile=certificate,
        ssl_keyfile=key,
        server_header=False,
        ws="none",
        # more than the patience of the clients, so that they and not we close idle connections
        timeout_keep_alive=75,
        timeout_graceful_shutdown=round(drain_seconds) + _LAST_SECONDS,
    )
    try:
        (before_ready or _nothing)()
        _Server(config, shutdown, drain_seconds, on_ready or _nothing).run([listener])
    finally:
        engine.close(_LAST_SECONDS)  # a forced end leaves the lifespan out


def _nothing() -> None:
    """What is done when nobody waits for the server to be ready."""
