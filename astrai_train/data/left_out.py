"""The list of what `prepare` leaves out, written as it grows: it may be longer than memory."""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from astrai_train.data.records import LeftOut


def left_out_file(out: Path) -> Path:
    """Where `prepare` writes which records it left out; there is none where it left none out."""
    return out.with_name(f"{out.name}.left_out.jsonl")


class LeftOutFile(AbstractContextManager["LeftOutFile"]):
    """A line of JSON for each record that is left out, in a file that is whole or absent.

    Args:
        path: the file; an old one stays until the new one is closed without an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        """Records so far."""
        self._temporary = path.with_name(f".{path.name}")
        self._file = self._temporary.open("w", encoding="utf-8")

    def append(self, one: LeftOut) -> None:
        """Add a record."""
        self._file.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
        self.count += 1

    def extend(self, some: Iterable[LeftOut]) -> None:
        """Add several."""
        for one in some:
            self.append(one)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self.count:
            self._temporary.replace(self.path)
            return
        self._temporary.unlink()
        if kind is None:
            self.path.unlink(missing_ok=True)
