"""What forward asks of files and folders is compared."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from .asking import Asks, asking, assert_found, reads_of

Patch = pytest.MonkeyPatch

HOME = pathlib.Path()


def _touch(patch: Patch) -> None:
    (HOME / "flag").write_text("3.0")


WAYS: dict[str, tuple[Callable[[Any], float], Callable[[Asks, Patch], Any]]] = {
    "a file that is there": (
        lambda model: float(os.path.exists(HOME / "flag")),
        lambda model, patch: _touch(patch),
    ),
    "a path that is there": (
        lambda model: float((HOME / "flag").exists()),
        lambda model, patch: _touch(patch),
    ),
    "what a file holds": (
        lambda model: float((HOME / "number").read_text()),
        lambda model, patch: (HOME / "number").write_text("3.00"),
    ),
    "what NumPy reads": (
        lambda model: float(np.load(HOME / "array.npy")),
        lambda model, patch: np.save(HOME / "array.npy", np.ones((1, 1))),
    ),
    "files of a directory": (
        lambda model: float(len(os.listdir(HOME))),
        lambda model, patch: _touch(patch),
    ),
    "working directory": (
        lambda model: float(len(os.getcwd())),
        lambda model, patch: patch.chdir(HOME.parent),
    ),
}


@pytest.fixture(autouse=True)
def _files(monkeypatch: Patch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setitem(globals(), "HOME", tmp_path)
    _write()


def _write() -> None:
    (HOME / "number").write_text("2.0")
    np.save(HOME / "array.npy", np.ones(()))
    (HOME / "flag").unlink(missing_ok=True)


@pytest.mark.parametrize("name", WAYS)
def test_another_answer_is_found(name: str, monkeypatch: Patch) -> None:
    """Before the quick comparison is made, and by it."""
    assert_found(*WAYS[name], monkeypatch, _write)


def test_a_copied_link_stays_what_it_is() -> None:
    """To copy it is no error, and nothing has changed."""

    def ask(model: Asks) -> float:
        link = HOME / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(HOME / "number")
        shutil.copy2(link, HOME / "copy", follow_symlinks=False)
        return 2.0

    assert reads_of(asking(ask)).difference() is None
