"""Folders that are whole or absent, and the `last` link that names the newest of them."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

LAST = "last"
_TEMPORARY = ".tmp-"
_REPLACED = ".replaced-"


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `folder` when the block ends well.

    The files reach the disk before the name changes hands, so that a crash at any moment leaves the
    old folder, or the new one, or (between two renames) the old one under another name, from which
    `recover_folder` brings it back.

    Raises:
        OSError: the disk is full, or something that is no folder has this name; nothing is changed.
    """
    folder = folder.resolve()
    recover_folder(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder, so no folder can take its place")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f"{_TEMPORARY}{folder.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        replaced = folder.with_name(_REPLACED + folder.name)
        if replaced.exists():
            shutil.rmtree(replaced)
        folder.rename(replaced)
        temporary.rename(folder)
        shutil.rmtree(replaced)
    else:
        temporary.rename(folder)
    _sync(folder.parent)


def recover_folder(folder: Path) -> None:
    """Give a folder its name back, if the process that was replacing it was killed in between."""
    replaced = folder.with_name(_REPLACED + folder.name)
    if not folder.exists() and replaced.is_dir():
        replaced.rename(folder)


def point_last(folder: str | Path) -> None:
    """Let `last`, beside the checkpoint, name it from now on; the move is atomic."""
    point(Path(folder), LAST)


def point(folder: Path, name: str) -> None:
    """Let a link beside a folder name it from now on; the move is atomic."""
    link = folder.parent / f"{_TEMPORARY}{name}-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.parent / name)
    _sync(folder.parent)


def read_last(root: str | Path) -> Path | None:
    """Return the checkpoint that `last` names below `root`, or None when there is none."""
    link = Path(root) / LAST
    if link.is_symlink():
        recover_folder(link.resolve())
    return link.resolve() if link.is_dir() else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
