"""The floors of the three packages: who may import whom, without a circle anywhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("graph_capture", "solvers", "planner")

FLOORS: tuple[tuple[str, ...], ...] = (
    ("graph_capture.suggestions",),
    (
        "graph_capture.json_text",
        "graph_capture.printable",
        "graph_capture.regular_file",
        "graph_capture.units",
    ),
    ("graph_capture.cost_graph",),
    ("solvers",),
    ("graph_capture.private_torch",),
    (
        "graph_capture.capture_lock",
        "graph_capture.errors",
        "graph_capture.lines",
        "graph_capture.without_collector",
    ),
    ("graph_capture.calls",),
    ("graph_capture.costs", "graph_capture.reads"),
    ("graph_capture.absent_cuda", "graph_capture.values"),
    ("graph_capture.recording",),
    ("graph_capture.loop",),
    ("graph_capture.tracing",),
    ("graph_capture.folding",),
    ("graph_capture.captured_step",),
    ("graph_capture.apart", "graph_capture.assembly", "graph_capture.policies"),
    ("graph_capture",),
    ("planner.errors",),
    ("planner.base",),
    ("planner.compiled_record",),
    ("planner.plan_record", "planner.comparison_record"),
    (
        "planner.planning",
        "planner.running",
        "planner.saving",
        "planner.report",
        "planner.plots",
        "planner.explaining",
        "planner.exporting",
    ),
    ("planner.measuring", "planner.sizing", "planner.blocks", "planner.compiled"),
    ("planner.plan",),
    ("planner.plan_set", "planner.block_plan"),
    ("planner.optimize", "planner.max_batch", "planner.comparing", "planner.pipeline"),
    ("planner.watch", "planner.frontier", "planner.mesh"),
    ("planner.versions",),
    ("planner",),
    ("planner.cli", "planner.demo", "planner.integrations"),
)
"""From the ground up. A room imports from its own files and from floors below, never from a
room beside it. A file belongs to the longest name that it begins with."""


def _modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


@cache
def _imports(name: str) -> set[str]:
    """Modules of ours that a file imports anywhere: in functions and for types, too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                part = f"{base}.{alias.name}"
                found.add(part if part in MODULES else base)
    return {module for module in found if module in MODULES and module != name}


def _room(name: str) -> tuple[int, str]:
    """Floor and room of a module."""
    rooms = [(len(r), i, r) for i, floor in enumerate(FLOORS) for r in floor]
    fitting = [(length, i, r) for length, i, r in rooms if name == r or name.startswith(r + ".")]
    _, floor, room = max(fitting)
    return floor, room


def test_there_is_no_circle() -> None:
    """No import circle anywhere, those in functions and for types included."""
    graph = nx.DiGraph((name, imported) for name in MODULES for imported in _imports(name))
    assert [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1] == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    """A file imports from its own room and from the floors below."""
    floor, room = _room(name)
    upwards = [
        imported
        for imported in sorted(_imports(name))
        if _room(imported)[1] != room and _room(imported)[0] >= floor
    ]
    assert upwards == []


@pytest.mark.parametrize("folder", [*PACKAGES, "benchmarks", "examples", "notebooks"])
def test_nothing_imports_tests(folder: str) -> None:
    """What tests and benchmarks share is in ``benchmarks/testing``."""
    pattern = re.compile(r"^\s*(?:from|import) +tests\b", re.MULTILINE)
    files = (ROOT / folder).rglob("*.py")
    assert [str(f) for f in files if pattern.search(f.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("module", ["solvers", "graph_capture.cost_graph"])
def test_graphs_and_solvers_need_no_torch(module: str) -> None:
    """Their tests start at once, and run where PyTorch is not installed."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
