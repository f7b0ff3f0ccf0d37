"""The door to PyTorch's private names: each does what we rely on, and nobody goes around it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from graph_capture import private_torch

from .private_torch import autograd_checks, calls_checks, compiling_checks, modules_checks

ROOT = Path(__file__).parents[2]

DOOR = ROOT / "graph_capture" / "private_torch"

ROOMS = [
    importlib.import_module(f"{private_torch.__name__}.{path.stem}")
    for path in sorted(DOOR.glob("*.py"))
    if path.stem != "__init__"
]

NAMES = {
    f"{room.__name__.rpartition('.')[2]}.{n}": (room, n) for room in ROOMS for n in room.__all__
}

CHECKS = {
    **calls_checks.CHECKS,
    **autograd_checks.CHECKS,
    **modules_checks.CHECKS,
    **compiling_checks.CHECKS,
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_name_does_what_we_rely_on(name: str) -> None:
    """It is there in this PyTorch and does the least thing that is asked of it."""
    assert CHECKS[name]()


def test_nothing_is_tried_that_is_not_there() -> None:
    """One check a name, no more."""
    assert CHECKS.keys() == NAMES.keys()


def test_door_names_its_rooms() -> None:
    """Its docstring says what each file is for."""
    said = set(re.findall(r"``([a-z_]+)``", private_torch.__doc__ or ""))
    assert {room.__name__.rpartition(".")[2] for room in ROOMS} <= said


def test_door_itself_loads_nothing() -> None:
    """Who only names the package pays nothing."""
    code = "import sys, graph_capture.private_torch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_compiler_is_not_loaded_by_naming_it() -> None:
    """Importing every room imports neither the partitioner nor what compiles."""
    rooms = ", ".join(f"graph_capture.private_torch.{p.stem}" for p in DOOR.glob("[a-z]*.py"))
    heavy = ("torch._functorch.partitioners", "torch._inductor", "torch._dynamo.eval_frame")
    code = f"import sys, {rooms}; sys.exit(str([m for m in {heavy} if m in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == ""


# -- the door is shut ------------------------------------------------------------------------
FILES = [
    path
    for package in ("graph_capture", "planner", "solvers")
    for path in sorted((ROOT / package).rglob("*.py"))
    if DOOR not in path.parents
]

PYTHON = {"_getframe", "_exit", "_replace", "_fields", "_asdict", "_make"}
"""Names that Python documents in spite of their underscore."""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def _written_here() -> set[str]:
    """Private names that our own files give: to functions, methods, fields, attributes of self."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) in ("self", "cls")
            ):
                names.add(node.attr)
    return names


BEHIND = frozenset(
    name
    for path in DOOR.glob("*.py")
    for name in re.findall(r"\b_[a-z]\w+", path.read_text("utf-8"))
)
"""Private names that the door speaks of: an own attribute of the same name is no excuse."""


def _around_the_door(source: str) -> list[str]:
    """What a file takes from PyTorch's private names by itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and _is_private(node.attr):
            text = ast.unparse(node)
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            ours = node.attr not in BEHIND and node.attr in _written_here()
            if text.startswith("torch.") or not (of_self or ours or node.attr in PYTHON):
                found.append(text)
            continue
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch._"):
            names = [ast.unparse(node)]
        else:
            continue
        private = (n for n in names if n.split(".")[0] in ("torch", "functorch"))
        found += [n for n in private if any(map(_is_private, n.split(".")))]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_goes_around_the_door(path: Path) -> None:
    """Private names of PyTorch, and private attributes of its objects, come through the door."""
    assert _around_the_door(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.autograd import _engine_run_backward",
        "from torch import _VF",
        "torch._C.DisableTorchFunction()",
        "getattr(torch._C, name)",
        "torch.ops.aten._to_copy.default",
        "func._schema.name",
        "node._saved_self",
        "module._parameters",
        "module._buffers",
        "storage()._cdata",
    ],
)
def test_ways_around_are_seen(source: str) -> None:
    """Each of the ways in which files took private names before."""
    assert _around_the_door(source)


NOT_OF_TORCH = {"replacing.Place", "inductor.GeneratedCode", "inductor_fusion.KernelPlace"}


@pytest.mark.parametrize("name", sorted(NAMES.keys() - NOT_OF_TORCH))
def test_line_says_since_when(name: str) -> None:
    """The version is said beside a name, above it, or in its docstring."""
    room, short = NAMES[name]
    lines = inspect.getsource(room).splitlines()
    pattern = re.compile(rf"(def {short}\(| {{4}}{short},|{short}(: .+)? = )")
    at = next(i for i, line in enumerate(lines) if pattern.match(line))
    said = lines[at - 1 : at + 2] if lines[at].startswith("def") else lines[at - 1 : at + 1]
    assert re.search(r"\b2\.\d+\+", " ".join(said))
