"""The pages hold together, name what there is, and quote what is said."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += sorted(DOCS.rglob("*.md"))

REFERENCE = {
    "planner": "planner",
    "graph_capture": "graph_capture",
    "solvers": "solvers",
    "solvers.strategies": "strategies",
    "planner.comparing.peers": "comparing",
}
"""The page of the reference that lists a module's public names."""

ELSEWHERE = {"planner": {"CaptureError"}}
"""Names that are described where they are defined."""


def relative(path: Path) -> str:
    """A path for a test's name."""
    return path.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", PAGES, ids=relative)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def links(page: Path) -> list[str]:
    """Where a page's links lead, those to the web left out."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """Files that are linked to are there, and so are the headings."""
    for target in links(page):
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(there), target


def test_the_index_names_every_page() -> None:
    """Whoever opens docs/ finds each page from its README."""
    index = DOCS / "README.md"
    named = {(DOCS / target).resolve() for target in links(index)}
    there = {*DOCS.rglob("*.md"), *DOCS.rglob("*.rst")} - {index, DOCS / "index.md"}
    assert there - named == set()


def test_the_readme_is_short() -> None:
    """At most 1,500 words: the rest is in docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    """A path of a Python file in a page leads to one, from the root or from a folder of ours."""
    ours = ("benchmarks", "docs", "examples", "graph_capture", "notebooks", "planner", "solvers")
    there = [p for top in (*ours, "tests") for p in (ROOT / top).rglob("*.py")]
    for name in re.findall(r"`([\w/]+\.py)`", prose(page)):
        if not name.startswith("torch/"):
            assert any(p.as_posix().endswith(f"/{name}") for p in there), name


@pages
def test_python_in_pages_is_python(page: Path) -> None:
    """Each block compiles, and what it imports from this project is there."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (
                "graph_capture",
                "planner",
                "solvers",
            ):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("module", REFERENCE)
def test_the_reference_lists_the_public_names(module: str) -> None:
    """All names of ``__all__`` and no others have an entry on the module's page."""
    page = (DOCS / "api" / f"{REFERENCE[module]}.rst").read_text(encoding="utf-8")
    described = set(re.findall(r"^\.\. (?:auto|py:)\w+:: (\w+)(?:\(\))?$", page, re.M))
    public = set(importlib.import_module(module).__all__)
    assert described == public - ELSEWHERE.get(module, set())


def said_in(package: str) -> Iterator[str]:
    """Every text in a package's source, with … for what is filled in."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )


def test_troubleshooting_quotes_what_is_said() -> None:
    """A message that is listed there is one that users can meet, word by word."""
    said = "\n".join((*said_in("planner"), *said_in("graph_capture")))
    quoted = re.findall(r"\*\*`([^`]+)`\*\*", prose(DOCS / "troubleshooting.md"))
    parts = [part.strip() for quote in quoted for part in quote.split("…")]
    assert len(quoted) > 40
    assert [part for part in parts if part not in said] == []
