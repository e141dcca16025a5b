"""Measured choices, kept from one start to the next in a folder that nobody else can write.

A file holds what it was measured for beside the result, and is believed only where both are sound:
it is a cache, so whatever is odd about it is said in the log, and it is measured again.
"""

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from astrai_core.compilation import private_cache

logger = logging.getLogger(__name__)

_FOLDER = "tuning"
_LARGEST = 100_000  # bytes; what is written is a few thousand


def read(facts: Mapping[str, object]) -> dict[str, object] | None:
    """The result kept for exactly these facts; None if there is none that can be believed."""
    try:
        file = _file(facts)
        if not os.path.lexists(file):
            return None
        text = _read_own(file)
        content = json.loads(text)
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        logger.warning("a kept choice of threads is ignored: %s", error)
        return None
    result = content.get("result") if isinstance(content, dict) else None
    if not isinstance(result, dict) or content.get("facts") != _plain(facts):
        logger.warning("a kept choice of threads is ignored: %s holds something else", file)
        return None
    return result


def write(facts: Mapping[str, object], result: Mapping[str, object]) -> None:
    """Keep a result; where that cannot be, say so in the log."""
    try:
        file = _file(facts)
        # another process may be reading: the finished file gets its name in one step
        handle, name = tempfile.mkstemp(dir=file.parent)  # readable by its owner alone
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump({"facts": _plain(facts), "result": result}, stream, indent=1)
            Path(name).replace(file)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        logger.warning("the choice of threads cannot be kept for the next start: %s", error)


def _file(facts: Mapping[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(_plain(facts), sort_keys=True).encode()).hexdigest()
    return private_cache(_FOLDER) / f"{digest[:32]}.json"


def _plain(facts: Mapping[str, object]) -> dict[str, object]:
    """The facts as JSON gives them back: tuples have become lists."""
    return json.loads(json.dumps(facts))


def _read_own(file: Path) -> str:
    """Read a file that is ours and a file.

    Raises:
        OSError: it is not.
    """
    # a link would lead out of the folder, and a pipe would never end
    handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            raise OSError(f"{file} is no file of ours")
        if status.st_uid != os.geteuid():
            raise OSError(f"{file} belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(f"{file} can be written by others")
        return stream.read().decode("utf-8")
