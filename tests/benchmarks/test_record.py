"""The published page of comparisons is what the published files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.compare.__main__ import RECORD
from benchmarks.compare.folder import read, read_failures
from benchmarks.compare.solve_at_peaks import (
    points_of_others,
    points_of_ours,
    uncovered,
)
from benchmarks.compare.tables import report
from benchmarks.run import ROOT

FOLDER = ROOT / "docs" / "record"
PROGRAMS = FOLDER / "programs"
PAGES = {FOLDER: RECORD, PROGRAMS: ("unet", "vgg16")}

pages = pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)


def tables_of(text: str) -> list[list[str]]:
    """The tables of a page, as lines."""
    tables: list[list[str]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            tables[-1].append(line)
        before = line
    return tables


@pages
def test_the_page_is_made_of_the_files(folder: Path) -> None:
    """No figure in it was written or kept by hand, and no model of record is missing."""
    found = read(folder, PAGES[folder], read_failures(folder, PAGES[folder]))
    assert not found.failures
    assert tuple(found.comparisons) == PAGES[folder]
    assert (folder / "compare.md").read_text(encoding="utf-8") == report(found)


@pytest.mark.parametrize(
    ("heading", "folder", "num_tables"),
    [
        ("Against every strategy", FOLDER, 4),
        ("Checkmate's program, its rounding and MOCCASIN", PROGRAMS, 2),
    ],
)
def test_tables_elsewhere_are_the_page_s(heading: str, folder: Path, num_tables: int) -> None:
    """The figures of record repeat some of its tables, whole."""
    section = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = section.split(f"## {heading}\n")[1].split("\n## ")[0]
    page = tables_of((folder / "compare.md").read_text(encoding="utf-8"))
    repeated = tables_of(section)
    assert len(repeated) == num_tables
    assert [table for table in repeated if table not in page] == []


@pages
def test_what_the_page_claims_of_every_model(folder: Path) -> None:
    """Nobody is below ours; what ran had eager's bits and never left its budget."""
    found = read(folder, PAGES[folder], {})
    for name, comparison in found.comparisons.items():
        solved = points_of_ours(comparison, found.at_peak[name])
        assert uncovered(points_of_others(comparison), solved) == [], name
        for row in comparison.rows:
            if row.kind == "strategy" and row.measured is not None:
                assert row.measured.bits == "equal", (name, row.strategy)
                if row.budget_bytes is not None and row.fits:
                    assert row.measured.peak_bytes <= row.budget_bytes, (name, row.strategy)
