"""What surrounds the code agrees with it: workflows, constraints, the citation."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(name: str) -> str:
    """A file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [".ci/run", ".github/workflows/ci.yml", "CONTRIBUTING.md"])
def test_targets_that_are_called_exist(name: str) -> None:
    """``make`` is asked for nothing that the Makefile lacks."""
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    called = set(re.findall(r"(?:^|[`\s])make ([a-z-]+)\b", read(name)))
    assert called
    assert called <= targets


def test_the_workflow_has_the_python_versions_that_are_promised() -> None:
    """The oldest that is supported and the newest that is named, with both ends of torch."""
    (versions,) = re.findall(r"python: \[(.*)\]", read(".github/workflows/ci.yml"))
    promised = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert versions == f'"{promised[0]}", "{promised[-1]}"'
    assert PROJECT["requires-python"] == f">={promised[0]}"


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_constraints_for_another_torch(which: str) -> None:
    """Only torch's line differs, and setuptools' pin goes, which torch has a say in."""
    done = subprocess.run(
        [ROOT / ".ci" / "constraints", which], capture_output=True, text=True, check=True
    )
    (torch,) = (r for r in PROJECT["dependencies"] if r.startswith("torch>="))
    oldest = torch.removeprefix("torch>=").split(",")[0]
    wanted = {"oldest": f"torch=={oldest}.*", "newest": "torch"}[which]
    expected = re.sub(r"^torch==.*$", wanted, read("constraints.txt"), flags=re.M)
    assert done.stdout == re.sub(r"^setuptools==.*$", "setuptools", expected, flags=re.M)


def test_the_citation_names_this_version() -> None:
    """CITATION.cff and pyproject.toml agree on version and licence."""
    citation = read("CITATION.cff")
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"\nlicense: {PROJECT['license']}\n" in citation


def test_every_package_is_in_the_wheel() -> None:
    """The list that setuptools goes by has each folder of modules, and none that is gone."""
    listed = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]["packages"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("graph_capture", "planner", "solvers")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert listed == sorted(folders)
