"""Notebooks from clean: executed in a fresh kernel, written without what changes by itself.

A committed notebook must show what its code gives. So the code's hash is written
into the metadata when the outputs are, and what would differ from one execution
or machine to the next is left out or refused: times of execution, addresses,
absolute paths, warnings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
HASH = "code_sha256"
CELL_LIMIT_S = 600
MOST_BYTES = 1_000_000

_NO_WIDGETS = "ignore:IProgress not found"
"""tqdm's warning, on import, that progress bars need ipywidgets."""

_ABSOLUTE = re.compile(r"(?<![\w.:/<)\]])/(?:[\w.-]+/)+[\w.-]+")
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


class _ThisPython(KernelSpecManager):
    """Kernels run in the interpreter that asks, whatever is installed for the user."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The one kernel."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def paths() -> list[Path]:
    """The notebooks in the order of their numbers."""
    return sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> NotebookNode:
    """Read and validate.

    Raises
    ------
    nbformat.ValidationError
        When it is no notebook of format 4.
    """
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write, keys sorted, so that nothing but what changed is in a diff."""
    text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Cells of code that is not empty."""
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def code_hash(notebook: NotebookNode) -> str:
    """Identifies the code, in the order of the cells."""
    sources = json.dumps([cell.source for cell in code_cells(notebook)])
    return hashlib.sha256(sources.encode()).hexdigest()


def execute(path: Path) -> NotebookNode:
    """A normalised copy with new outputs. It runs in a folder of its own, which is removed.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        When a cell raises.
    nbclient.exceptions.CellTimeoutError
        When a cell takes longer than ``CELL_LIMIT_S``.
    """
    notebook = read(path)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": _NO_WIDGETS}
    with tempfile.TemporaryDirectory() as folder:
        manager = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=_ThisPython(),
            connection_file=str(Path(folder, "kernel.json")),
            transport="ipc" if os.name == "posix" else "tcp",  # no ports that others can read
        )
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=CELL_LIMIT_S,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment, cleanup_kc=True)  # ends the kernel, too
    return normalised(notebook)


def normalised(notebook: NotebookNode) -> NotebookNode:
    """The same without what changes by itself, and with the hash of its code."""
    notebook = nbformat.from_dict(notebook)
    for number, cell in enumerate(code_cells(notebook), start=1):
        cell.metadata.pop("execution", None)
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    notebook.metadata = NotebookNode(
        kernelspec=NotebookNode(KERNELSPEC),
        language_info=NotebookNode(name="python"),
        **{HASH: code_hash(notebook)},
    )
    return notebook


def problems(notebook: NotebookNode) -> Iterator[str]:
    """Why a notebook must not be committed as it is; nothing if it may be."""
    if notebook.metadata.get("kernelspec") != KERNELSPEC:
        yield f"its kernelspec is {notebook.metadata.get('kernelspec')}, not {KERNELSPEC}"
    if notebook.metadata.get(HASH) != code_hash(notebook):
        yield "its outputs do not belong to its code"
    size_bytes = len(json.dumps(notebook))
    if size_bytes > MOST_BYTES:
        yield f"it has {size_bytes} bytes, more than {MOST_BYTES}"
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        yield f"its execution counts are {counts}"
    for number, cell in enumerate(cells, start=1):
        if "execution" in cell.metadata:
            yield f"cell {number} carries times of execution"
        for problem in _problems_of_outputs(cell.outputs):
            yield f"cell {number} {problem}"


def _problems_of_outputs(outputs: Iterable[NotebookNode]) -> Iterator[str]:
    private = {str(Path.home()), str(ROOT), sys.prefix, tempfile.gettempdir()} - {"/"}
    for output in outputs:
        if output.output_type == "error":
            yield f"raises {output.ename}: {output.evalue}"
        if output.get("name") == "stderr":
            yield f"writes to stderr: {output.text.strip()[:300]}"
        for text in _texts(output):
            found = _ABSOLUTE.search(text) or _ADDRESS.search(text)
            leaks = [found.group()] if found else [p for p in private if p in text]
            if leaks:
                yield f"shows {leaks[0]!r}, which differs from machine to machine"


def _texts(output: NotebookNode) -> Iterator[str]:
    if "text" in output:
        yield output.text
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield value


def kinds(notebook: NotebookNode) -> list[list[str]]:
    """For each cell of code the kinds of its outputs: what must come out every time."""
    return [
        [", ".join(sorted(o.get("data", {}))) or o.get("name", o.output_type) for o in cell.outputs]
        for cell in code_cells(notebook)
    ]
