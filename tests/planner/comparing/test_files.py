"""Comparisons as files and as data frames."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner import Comparison, ComparisonRow
from planner.base.solve_options import DEFAULT_GAP
from planner.comparing.bound_text import OTHER_ORDER
from planner.comparing.files import ComparisonFileError
from planner.comparison_record import BudgetBound, MeasuredStep
from solvers.scopes import BoundScope


def step(ratio: float = 1.25) -> MeasuredStep:
    """Measured figures, by hand."""
    return MeasuredStep(
        peak_bytes=601,
        step_us=ratio * 100,
        eager_us=100.0,
        ratio=ratio,
        quartiles=(ratio, ratio + 1),
        num_pairs=0 if math.isnan(ratio) else 3,
        bits="equal",
    )


@pytest.fixture
def comparison() -> Comparison:
    """Two rows at a budget, one of them an error, and one of a peer without times."""
    return Comparison(
        model="hand-made",
        rows=(
            ComparisonRow(
                strategy="auto",
                budget="60%",
                budget_bytes=600,
                setting="k=3, n=2",
                fits=True,
                predicted_peak_bytes=600,
                predicted_step_us=120.5,
                overhead=0.205,
                gap=0.0,
                num_recomputed=7,
                solve_s=0.25,
                measured=step(),
            ),
            ComparisonRow(strategy="dtr", budget="60%", budget_bytes=600, error='no, "it" fails'),
            ComparisonRow(strategy="compiled", kind="peer", measured=step(math.nan)),
        ),
        bounds=(
            BudgetBound(
                budget="60%", budget_bytes=600, lower_bound_us=120.5, scope=BoundScope.ANY_ORDER
            ),
            BudgetBound(
                budget="1B", budget_bytes=1, lower_bound_us=None, scope=BoundScope.ANY_ORDER
            ),
        ),
        baseline_peak_bytes=1000,
        baseline_step_us=100.0,
        least_bytes=400,
        least_bound_bytes=300,
        eager=step(1.0),
        device="a device",
        cost_model="roofline",
        fingerprint="f" * 8,
        seed=0,
        versions={"torch": "2"},
        machine={"num_cpus": 2, "load_average": 0.5, "cpu": "x"},
    )


def test_json_both_ways(comparison: Comparison, tmp_path: Path) -> None:
    """What is read equals what was written, times that were not taken included."""
    comparison.save(tmp_path / "table.json")
    found = Comparison.load(tmp_path / "table.json")
    assert repr(found) == repr(comparison)  # NaN is not equal to itself
    assert found.rows[:2] == comparison.rows[:2]
    assert "NaN" not in (tmp_path / "table.json").read_text()


def test_a_file_without_a_gap_is_read(comparison: Comparison, tmp_path: Path) -> None:
    """The gap of the solves is kept; files from before it was have compare's usual one."""
    path = tmp_path / "table.json"
    replace(comparison, gap=0.05).save(path)
    assert Comparison.load(path).gap == 0.05
    data = json.loads(path.read_text())
    del data["gap"]
    path.write_text(json.dumps(data))
    assert Comparison.load(path).gap == DEFAULT_GAP


def test_rows_are_joined_to_bounds_by_bytes_too(comparison: Comparison) -> None:
    """Two budgets of one label, as files may have them, are two blocks, each with its bound."""
    (row, *others) = comparison.rows
    (bound, *rest) = comparison.bounds
    more = replace(row, budget_bytes=601, predicted_step_us=110.0)
    wider = replace(bound, budget_bytes=601, lower_bound_us=105.0)
    both = replace(comparison, rows=(row, *others, more), bounds=(bound, *rest, wider))
    found = {r["budget_bytes"]: r["lower_bound_us"] for r in both.records() if r["budget_bytes"]}
    assert found == {600: 120.5, 601: 105.0}
    assert sum(line.startswith("*  auto") for line in str(both).splitlines()) == 2


def test_csv_has_a_line_for_each_row(comparison: Comparison, tmp_path: Path) -> None:
    """The CSV has the records' figures, and nothing where there are none."""
    comparison.save(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["strategy"] for line in lines] == ["auto", "dtr", "compiled"]
    for line, record in zip(lines, comparison.records(), strict=True):
        assert line == {k: "" if v is None else str(v) for k, v in record.items()}
    assert lines[0]["peak_share"] == "0.6"
    assert lines[0]["lower_bound_us"] == "120.5"
    assert lines[1]["error"] == 'no, "it" fails'
    assert lines[2]["measured_ratio"] == ""


def test_pandas_view(comparison: Comparison) -> None:
    """The data frame has the records."""
    frame = comparison.to_pandas()
    assert list(frame["strategy"]) == ["auto", "dtr", "compiled"]
    assert frame["overhead"][0] == 0.205
    assert math.isnan(frame["overhead"][1])


def test_pandas_is_optional(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pandas the error names the extra."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"remat-planner\[research\]"):
        comparison.to_pandas()


def test_other_suffixes_are_refused(comparison: Comparison, tmp_path: Path) -> None:
    """A file is .json or .csv."""
    with pytest.raises(ValueError, match=r"\.json or \.csv"):
        comparison.save(tmp_path / "table.xlsx")


def test_a_failed_write_leaves_the_old_file(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is written whole or not at all."""
    path = tmp_path / "table.json"
    path.write_text("before")

    def fail(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("planner.base.atomic_write.os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        comparison.save(path)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def _set(*keys: Any) -> Any:
    *path, value = keys

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_set("format", "plan"), "its format is not"),
        (_set("version", 99), "version is 99"),
        (_set("seed", "0"), r"\$\.seed"),
        (_set("seed", True), r"\$\.seed"),
        (_set("rows", {}), r"\$\.rows: .* is not a list"),
        (_set("rows", 0, "kind", "other"), r"\$\.rows\[0\]\.kind"),
        (_set("rows", 0, "setting", None), r"\$\.rows\[0\]\.setting"),
        (_set("rows", 0, "measured", "quartiles", [1]), "1 values where 2 belong"),
        (_set("rows", 1, "new", 1), "'new' is unknown"),
        (_set("rows", 1, 5), r"\$\.rows\[1\]: no ComparisonRow"),
        (_set("versions", "torch", 2), r"\$\.versions\.torch"),
        (_set("machine", []), r"\$\.machine"),
        (_set("baseline_peak_bytes", 0), r"\$\.baseline_peak_bytes: 0, so no share"),
        (_set("baseline_step_us", None), r"\$\.baseline_step_us"),
        (_set("least_bytes", 10**400), r"\$\.least_bytes"),
        (_set("rows", 0, "predicted_peak_bytes", -1), r"peak_bytes: -1 is below zero"),
        (_set("rows", 0, "measured", "num_pairs", -1), r"num_pairs: -1 is below zero"),
        (_set("bounds", 0, "lower_bound_us", -0.5), r"lower_bound_us: -0.5 is below zero"),
        (lambda data: data.pop("bounds"), "'bounds' is missing"),
    ],
)
def test_a_damaged_file_says_where(
    comparison: Comparison, tmp_path: Path, damage: Any, word: str
) -> None:
    """Every value is checked against its field's type before anything is believed."""
    path = tmp_path / "table.json"
    comparison.save(path)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ComparisonFileError, match=word):
        Comparison.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", '{"format": NaN}', "[" * 100_000])
def test_what_is_no_comparison(tmp_path: Path, text: str) -> None:
    """A file that is not JSON, or other JSON, is refused."""
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ComparisonFileError, match="is not"):
        Comparison.load(path)


def test_the_table_shows_it(comparison: Comparison) -> None:
    """Figures by hand, as they are printed."""
    lines = str(comparison).splitlines()
    assert lines[:2] == [
        "hand-made: torch 2, seed 0",
        "predicted: times by roofline for a device",
    ]
    assert (
        f"budget 60%: 600 B; proven: no overhead below +20.50% for {BoundScope.ANY_ORDER.words}"
        in lines
    )
    assert f"budget 1B: 1 B; proven: nothing fits for {BoundScope.ANY_ORDER.words}" in lines
    (ours,) = [line for line in lines if line.startswith("*  auto")]
    assert " ".join(ours.split()) == (
        "* auto k=3, n=2 600 B 60.0% +20.50% 0.00% 7 0.25 s 601 B 1.250 1.250 – 2.250 equal"
    )
    assert any("dtr" in line and 'no, "it" fails' in line for line in lines)


def test_what_was_measured_on_what_is_shown(comparison: Comparison, tmp_path: Path) -> None:
    """Table, records and file tell the machine that steps ran on from the one predicted for."""
    ran = replace(
        comparison,
        dtype="float32",
        autocast="bfloat16",
        optimizer="adamw",
        measured_on="a real CPU",
        num_threads=2,
        repeats=3,
        least_solve_s=1.5,
    )
    lines = str(ran).splitlines()
    assert lines[:3] == [
        "hand-made: float32, autocast bfloat16, adamw, torch 2, seed 0",
        "predicted: times by roofline for a device",
        "measured: a real CPU, 2 threads, 3 pairs of steps asked for, load average 0.50 at the "
        "start",
    ]
    assert any(line.startswith("searching for it took 1.50 s") for line in lines)
    record = ran.records()[0]
    names = ("measured_on", "num_threads", "repeats", "dtype", "autocast", "optimizer", "versions")
    assert [record[name] for name in names] == [
        "a real CPU", 2, 3, "float32", "bfloat16", "adamw", "torch 2",
    ]  # fmt: skip
    assert record["load_average"] == 0.5
    assert comparison.records()[0]["load_average"] is None  # nothing was timed
    ran.save(tmp_path / "table.json")
    assert repr(Comparison.load(tmp_path / "table.json")) == repr(ran)


def test_a_file_of_before_is_read(comparison: Comparison, tmp_path: Path) -> None:
    """What version 1 was first written without has its default."""
    path = tmp_path / "table.json"
    comparison.save(path)
    data = json.loads(path.read_text())
    for name in ("dtype", "autocast", "optimizer", "measured_on", "num_threads", "repeats"):
        del data[name]
    del data["least_solve_s"]
    path.write_text(json.dumps(data))
    assert repr(Comparison.load(path)) == repr(comparison)


def test_proofs_have_their_scope_and_are_rounded_down(comparison: Comparison) -> None:
    """No more is claimed than is proven: of eager's order, and at most the bound."""
    bounds = tuple(
        replace(b, scope=BoundScope.BASE_ORDER, lower_bound_us=b.lower_bound_us and 120.5678)
        for b in comparison.bounds
    )
    proven = replace(comparison, bounds=bounds, least_bound_bytes=299_999, least_bytes=400_000)
    lines = str(proven).splitlines()
    assert "budget 60%: 600 B; proven: no overhead below +20.56% in eager's order" in lines
    assert "budget 1B: 1 B; proven: nothing fits in eager's order" in lines
    assert any("proven impossible below 299 kB in eager's order" in line for line in lines)
    assert [r["bound_scope"] for r in proven.records()] == [
        BoundScope.BASE_ORDER,
        BoundScope.BASE_ORDER,
        None,
    ]


def test_notes_that_bear_on_figures_are_printed(comparison: Comparison) -> None:
    """A peer's note and a schedule in another order stand under their rows."""
    ours, failed, peer = comparison.rows
    assert "no cache" not in str(comparison)
    rows = (replace(ours, note="by me", off_order=True), failed, replace(peer, note="no cache"))
    lines = [line.strip() for line in str(replace(comparison, rows=rows)).splitlines()]
    assert lines[lines.index(f"auto: {OTHER_ORDER}") - 1].startswith("*  auto")
    assert lines[lines.index("compiled: no cache") - 1].startswith("compiled")


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 400, "-1e999"])
@pytest.mark.parametrize("path", [("baseline_step_us",), ("machine", "load_average")])
def test_a_number_beyond_all_is_refused(
    comparison: Comparison, tmp_path: Path, number: str, path: tuple[str, ...]
) -> None:
    """What could not be computed with, or written again, is not read."""
    file = tmp_path / "table.json"
    comparison.save(file)
    data = json.loads(file.read_text())
    _set(*path, "HERE")(data)
    file.write_text(json.dumps(data).replace('"HERE"', number))
    with pytest.raises(ComparisonFileError, match="number"):
        Comparison.load(file)


def test_what_cannot_be_loaded_says_the_next_step(tmp_path: Path) -> None:
    """No file, records only and a damaged file are told with what writes a usable one."""
    with pytest.raises(FileNotFoundError, match=r"comparison\.save.*absent\.json"):
        Comparison.load(tmp_path / "absent.json")
    for name in ("table.csv", "damaged.json"):
        (tmp_path / name).write_text("{")
        again = name.replace("csv", "json")
        with pytest.raises(ComparisonFileError, match=rf"comparison.save\('{again}'\)"):
            Comparison.load(tmp_path / name)


def test_long_errors_are_whole_and_doubts_are_told(comparison: Comparison) -> None:
    """A long error is printed to its last word; noise and a wrong cost model are warned of."""
    long = "a reason " * 30 + "and its end"
    rows = tuple(replace(r, error=long) if r.strategy == "dtr" else r for r in comparison.rows)
    eager = MeasuredStep(
        peak_bytes=1000,
        step_us=10 * comparison.baseline_step_us,
        eager_us=10 * comparison.baseline_step_us,
        ratio=1.0,
        quartiles=(0.7, 1.3),
        num_pairs=4,
        bits="equal",
    )
    text = " ".join(str(replace(comparison, rows=rows, eager=eager)).split())
    assert long in text
    assert "…" not in text
    assert "quartiles 0.700 to 1.300): the machine is too busy" in text
    assert "roofline, that does not fit this step" in text
    calm = replace(eager, step_us=comparison.baseline_step_us, quartiles=(0.99, 1.01))
    assert "warning" not in str(replace(comparison, eager=calm))
    aside = str(replace(comparison, eager=replace(calm, quartiles=(0.93, 0.98))))
    assert "one-sided (quartiles 0.930 to 0.980)" in " ".join(aside.split())
