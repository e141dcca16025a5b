"""Weights that are read in a thread of their own, while another one imports and reads the rest."""

import sys
import threading
from concurrent.futures import Future
from types import TracebackType

from astrai_core.model import Transformer
from astrai_serve.model_source import ModelSource

_SWITCH_SECONDS = 0.0002
"""How long one thread may keep Python's lock from the other, instead of 5 ms: the loader gives it
away for each tensor and asks for it back a moment later, a thousand times."""


class Loading:
    """A model that is being read; within a `with` block, which may end before it is there.

    Args:
        source: what to read.
    """

    def __init__(self, source: ModelSource):
        self._source = source
        self._model: Future[Transformer] = Future()

    def __enter__(self) -> "Loading":
        self._usual = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        # a daemon: an interrupt ends the process without waiting for the weights
        self._thread = threading.Thread(target=self._load, name="astrai-loading", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        sys.setswitchinterval(self._usual)
        # torch complains to the user where a process ends while it computes
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            self._thread.join()

    def result(self) -> Transformer:
        """Wait for the model; what went wrong in reading it is raised here."""
        return self._model.result()

    def _load(self) -> None:
        try:
            self._model.set_result(self._source.load())
        except BaseException as error:
            self._model.set_exception(error)
