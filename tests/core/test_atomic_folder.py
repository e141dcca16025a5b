import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from astrai_core.atomic_folder import point_last, read_last, replace_folder


def write(folder, text):
    with replace_folder(folder) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text(text)


def read(folder):
    return (folder / "deep" / "file").read_text()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_and_is_replaced_whole(tmp_path):
    write(tmp_path / "a" / "step", "old")
    write(tmp_path / "a" / "step", "new")
    assert read(tmp_path / "a" / "step") == "new"
    assert names(tmp_path / "a") == ["step"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
    write(tmp_path / "step", "old")

    def fail():
        with replace_folder(tmp_path / "step") as temporary:
            (temporary / "file").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert (read(tmp_path / "step"), names(tmp_path)) == ("old", ["step"])


def test_a_file_of_that_name_is_not_lost(tmp_path):
    (tmp_path / "step").write_text("precious")
    with pytest.raises(FileExistsError, match="is not a folder"):
        write(tmp_path / "step", "new")
    assert (tmp_path / "step").read_text() == "precious"
    assert names(tmp_path) == ["step"]


def test_a_link_stays_a_link(tmp_path):
    write(tmp_path / "step", "old")
    point_last(tmp_path / "step")
    write(tmp_path / "last", "new")
    assert (tmp_path / "last").is_symlink()
    assert read(tmp_path / "step") == read(tmp_path / "last") == "new"


def test_last_moves_and_may_be_absent(tmp_path):
    assert read_last(tmp_path) is None
    for name in ("one", "two"):
        write(tmp_path / name, name)
        point_last(tmp_path / name)
        assert read_last(tmp_path) == tmp_path / name
    assert names(tmp_path) == ["last", "one", "two"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_at_any_rename_leaves_a_whole_folder(renames, tmp_path):
    """Old, or new once both renames were done; in between the old one gets its name back."""
    write(tmp_path / "step", "old")
    point_last(tmp_path / "step")
    program = f"""
        import os, signal, pathlib
        from astrai_core.atomic_folder import replace_folder
        rename, count = pathlib.Path.rename, 0
        def counted(path, target):
            global count
            if count == {renames}:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return rename(path, target)
        pathlib.Path.rename = counted
        remove = __import__("shutil").rmtree
        def removing(path, **options):
            if "replaced" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            remove(path, **options)
        __import__("shutil").rmtree = removing
        with replace_folder(pathlib.Path("step")) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / "file").write_text("new")
        """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    assert killed.returncode == -signal.SIGKILL
    last = read_last(tmp_path)
    assert last is not None
    assert read(last) == ("new" if renames == 2 else "old")
    write(tmp_path / "step", "newest")
    assert read(tmp_path / "step") == "newest"
    assert [name for name in names(tmp_path) if "replaced" in name] == []
