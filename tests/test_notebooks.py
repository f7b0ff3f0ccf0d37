"""Committed notebooks show what their code gives, and their code runs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks.execution import ROOT, code_cells, execute, normalised, paths, problems, read, write

NAMES = [path.name for path in paths()]


def notebook_of(*sources: str) -> NotebookNode:
    """A notebook with cells of code that were never executed."""
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """A small notebook after its execution."""
    path = tmp_path_factory.mktemp("notebooks") / "small.ipynb"
    write(notebook_of("import sys\nprint(6 * 7)", "sys.prefix != ''"), path)
    return execute(path)


def test_there_are_four():
    """Quickstart, anatomy, comparison and proof."""
    assert [name[0] for name in NAMES] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_belong_to_the_code(name: str):
    """No notebook is stale, holds an error, a warning or a path, or is too large."""
    assert list(problems(read(ROOT / "notebooks" / name))) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_explained(name: str):
    """Behind a cell that draws comes a sentence on what to see."""
    cells = read(ROOT / "notebooks" / name).cells
    for cell, following in pairwise(cells):
        drawn = any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))
        if drawn:
            assert following.cell_type == "markdown"
            assert following.source.startswith("*What to see:*")


@pytest.mark.parametrize("name", NAMES)
def test_links_between_notebooks_lead_somewhere(name: str):
    """What a notebook links to lies beside it."""
    cells = read(ROOT / "notebooks" / name).cells
    for cell in (c for c in cells if c.cell_type == "markdown"):
        for part in cell.source.split("](")[1:]:
            target = part.split(")")[0]
            assert (ROOT / "notebooks" / target).exists()


@pytest.mark.parametrize("name", NAMES)
def test_readme_or_docs_name_each(name: str):
    """A reader finds the notebooks."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(name in page.read_text(encoding="utf-8") for page in pages)


def test_execution_uses_this_interpreter_and_gives_a_clean_notebook(executed: NotebookNode):
    """Outputs, counts in order, and nothing that must not be committed."""
    first, second = code_cells(executed)
    assert first.outputs[0].text == "42\n"
    assert second.outputs[0].data["text/plain"] == "True"
    assert [first.execution_count, second.execution_count] == [1, 2]
    assert list(problems(executed)) == []


def test_the_kernel_is_that_of_this_interpreter(tmp_path: Path):
    """Whatever kernels are installed for the user."""
    path = tmp_path / "where.ipynb"
    write(notebook_of(f"import sys\nprint(sys.executable == {sys.executable!r})"), path)
    assert code_cells(execute(path))[0].outputs[0].text == "True\n"


def test_a_change_of_code_is_found(executed: NotebookNode):
    """Outputs of other code are refused."""
    changed = copy.deepcopy(executed)
    changed.cells[0].source += "  # and more"
    assert list(problems(changed)) == ["its outputs do not belong to its code"]


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ({"output_type": "stream", "name": "stderr", "text": "careful"}, "writes to stderr"),
        ({"output_type": "stream", "name": "stdout", "text": "in /home/me/x.py"}, "/home/me/x.py"),
        ({"output_type": "stream", "name": "stdout", "text": "<f at 0x7f12345678>"}, "at 0x7f"),
        ({"output_type": "stream", "name": "stdout", "text": str(ROOT)}, str(ROOT)),
        (
            {"output_type": "error", "ename": "KeyError", "evalue": "x", "traceback": []},
            "raises KeyError",
        ),
    ],
)
def test_outputs_that_must_not_be_committed_are_found(
    executed: NotebookNode, output: dict[str, str], found: str
):
    """Warnings, paths, addresses and errors are named with their cell."""
    leaking = copy.deepcopy(executed)
    leaking.cells[1].outputs = [nbformat.from_dict(output)]
    (problem,) = problems(leaking)
    assert problem.startswith("cell 2 ")
    assert found in problem


def test_text_with_slashes_is_no_path(executed: NotebookNode):
    """Rates, fractions and module paths may be printed."""
    harmless = copy.deepcopy(executed)
    text = "12 MB/s, 3/4, a/b/c.py, </td></tr>, n/a"
    harmless.cells[0].outputs = [nbformat.v4.new_output("stream", text=text)]
    assert list(problems(harmless)) == []


def test_normalising_leaves_out_times_of_execution(executed: NotebookNode):
    """Two executions differ in their outputs only."""
    noisy = copy.deepcopy(executed)
    noisy.cells[0].metadata["execution"] = {"shell.execute_reply": "2020-01-01"}
    noisy.cells[1].execution_count = 17
    assert "cell 1 carries times of execution" in list(problems(noisy))
    assert json.dumps(normalised(noisy)) == json.dumps(executed)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_clean(name: str):
    """In a fresh kernel no cell fails, and the kinds of outputs are those that are committed."""
    done = subprocess.run(
        [sys.executable, "-m", "notebooks", "--check", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
