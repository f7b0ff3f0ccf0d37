"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from planner.base.atomic_write import write_whole

ROOT = Path(__file__).parents[3]


def test_a_symbolic_link_stays(tmp_path: Path) -> None:
    """What it names is written."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to(Path("folder") / "real.json")
    write_whole(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "folder" / "real.json").read_text() == "new"


def test_a_link_to_nothing_is_written_through(tmp_path: Path) -> None:
    """As every other program would."""
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    """A file that others may not read does not become readable."""
    path = tmp_path / "plan.json"
    path.write_text("old")
    path.chmod(mode)
    write_whole(path, "new")
    assert path.stat().st_mode & 0o777 == mode


def test_a_protected_file_is_not_replaced(tmp_path: Path) -> None:
    """The error names it, and nothing is left beside it."""
    path = tmp_path / "plan.json"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match=r"write-protected.*plan\.json"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_pipes_and_folders_are_not_replaced(tmp_path: Path) -> None:
    """They are what they were."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        write_whole(tmp_path / "pipe", "new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "folder", "new")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    """Not the one beside it that could not be made."""
    with pytest.raises(FileNotFoundError, match=r"nothing was written: '.*none/plan\.json'"):
        write_whole(tmp_path / "none" / "plan.json", "new")


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    """What is written beside it has a name of its own."""
    write_whole(tmp_path / ("n" * 255), "new")
    assert os.listdir(tmp_path) == ["n" * 255]


# By itself, without the package around it: PyTorch takes seconds.
_KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic_write", "planner/base/atomic_write.py")
atomic_write = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic_write)
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
atomic_write.write_whole(Path(sys.argv[1]), "half")
"""


@pytest.mark.parametrize("name", ["plan.json", "n" * 255, "[a]*.json"])
def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path, name: str) -> None:
    """And nothing else is: files of another name stay."""
    path = tmp_path / name
    ended = subprocess.run([sys.executable, "-c", _KILLED, str(path)], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    (tmp_path / ".other.0123456789abcdef.partial").write_text("")
    write_whole(path, "new")
    assert sorted(os.listdir(tmp_path)) == sorted([".other.0123456789abcdef.partial", name])


def test_writers_at_once_do_not_clear_each_other(tmp_path: Path) -> None:
    """Each of eight threads writes a hundred times; every file is one of theirs, none is left."""
    path = tmp_path / "plan.json"
    failures: list[Exception] = []

    def write(number: int) -> None:
        try:
            for _ in range(100):
                write_whole(path, str(number) * 1000)
        except (OSError, ValueError) as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(set(path.read_text())) == 1
    assert os.listdir(tmp_path) == ["plan.json"]
