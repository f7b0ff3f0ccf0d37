"""Whose code it is that a forward runs: the user's, an installed package's, or Python's."""

from __future__ import annotations

import importlib
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from graph_capture.reads.named_reads import is_library_file, is_users_file
from planner import optimize

STANDARD = sysconfig.get_paths()["stdlib"]
LIBRARY = """
from torch import nn

GAIN = 1.0

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return (self.linear(x).tanh() * GAIN).square().mean()
"""


@pytest.mark.parametrize(
    "folder",
    [
        sysconfig.get_paths()["purelib"],
        sysconfig.get_paths()["platlib"],
        site.getusersitepackages(),
        f"{STANDARD}/site-packages",  # as a virtual environment sees what lies below it
        "/usr/lib/python3/dist-packages",
    ],
)
def test_an_installed_package_may_lie_anywhere(folder: str) -> None:
    """What pip or the system installed is a library's, and is watched as one."""
    name = str(Path(folder) / "package" / "module.py")
    assert is_library_file(name)
    assert is_users_file(name)


def test_python_s_own_files_and_the_user_s_are_told_apart() -> None:
    """Neither is a library's; only the user's are watched."""
    assert not is_library_file(f"{STANDARD}/random.py")
    assert not is_users_file(f"{STANDARD}/random.py")
    assert not is_library_file("/home/somebody/model.py")
    assert is_users_file("/home/somebody/model.py")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package that lies where the packages below a virtual environment do."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "package_below.py").write_text(LIBRARY, encoding="utf-8")
    monkeypatch.setattr("graph_capture.reads.named_reads._STANDARD_ROOT", str(tmp_path))
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("package_below")
    del sys.modules["package_below"]


def test_what_a_package_elsewhere_reads_is_compared(package: Any) -> None:
    """A name of it that changes after planning changes the planned step as it changes eager's."""
    x, layer = torch.randn(8, 16), package.Layer()
    package.GAIN = 2.0
    expected = layer(x).item()
    package.GAIN = 1.0
    optimize(layer, x, budget_gb=1).apply(layer)
    layer(x).backward()
    package.GAIN = 2.0
    assert layer(x).item() == expected
