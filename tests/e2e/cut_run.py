"""A run's folder as it is left by a process that was killed."""

import shutil
from pathlib import Path


def cut_off_after(step: int, whole: Path, cut: Path) -> None:
    """Make of a finished run's folder what is there when it is killed after a step."""
    shutil.copytree(whole, cut, symlinks=True)
    (cut / "finished.json").unlink()
    for folder in (cut / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    (cut / "checkpoints" / "last").unlink()
    (cut / "checkpoints" / "last").symlink_to(f"step-{step:08d}")
