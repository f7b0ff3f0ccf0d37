"""The published page of comparisons is what the published files say."""

from __future__ import annotations

from benchmarks.compare.__main__ import RECORD
from benchmarks.compare.folder import read, read_failures
from benchmarks.compare.settle import points_of_others, points_of_ours, uncovered
from benchmarks.compare.tables import report
from benchmarks.run import ROOT

FOLDER = ROOT / "docs" / "record"


def test_the_page_is_made_of_the_files() -> None:
    """No figure in it was written or kept by hand, and no model of record is missing."""
    found = read(FOLDER, RECORD, read_failures(FOLDER, RECORD))
    assert not found.failures
    assert tuple(found.comparisons) == RECORD
    assert (FOLDER / "compare.md").read_text(encoding="utf-8") == report(found)


def test_tables_elsewhere_are_the_page_s() -> None:
    """The figures of record repeat some of its tables, line for line."""
    section = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = section.split("## Against every strategy\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    page = (FOLDER / "compare.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 30
    assert [line for line in lines if line not in page] == []


def test_what_the_page_claims_of_every_model() -> None:
    """Nobody is below ours; what ran had eager's bits and never left its budget."""
    found = read(FOLDER, RECORD, {})
    for name, comparison in found.comparisons.items():
        settled = points_of_ours(comparison, found.settled[name])
        assert uncovered(points_of_others(comparison), settled) == [], name
        for row in comparison.rows:
            if row.kind == "strategy" and row.measured is not None:
                assert row.measured.bits == "equal", (name, row.strategy)
                if row.budget_bytes is not None and row.fits:
                    assert row.measured.peak_bytes <= row.budget_bytes, (name, row.strategy)
