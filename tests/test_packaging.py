"""pyproject.toml lists what is there: packages are named one by one."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed():
    """A folder with Python files below the three packages is in the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    there = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for top in ("graph_capture", "planner", "solvers")
        for file in (ROOT / top).rglob("*.py")
    }
    assert sorted(there) == settings["tool"]["setuptools"]["packages"]


def test_every_constraint_is_a_direct_dependency():
    """Constraints pin each direct dependency once, and nothing else."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = settings["project"]
    needed = {
        requirement.split(">=")[0]
        for group in (project["dependencies"], *project["optional-dependencies"].values())
        for requirement in group
        if ">=" in requirement
    }
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==")[0] for line in lines if not line.startswith("#")]
    assert pinned == sorted(needed)
