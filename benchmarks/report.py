"""The output of a benchmark: a table on the terminal, CSV and JSON in a folder."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from planner.comparing.machine import machine, version_of
from solvers.scopes import BoundScope

from .run import Run, as_record, best_costs

PACKAGES = ("remat-planner", "highspy", "ortools", "numba", "numpy", "scipy", "torch")


def table_of(runs: Sequence[Run], title: str) -> Table:
    """A row for each run, a rule between cases."""
    table = Table(title=title, caption="times in s; within 1 %: of the best schedule of this run")
    for name in ("instance", "budget", "solver"):
        table.add_column(name)
    for name in ("first", "within 1 %", "proof", "overhead %", "bound %", "gap %"):
        table.add_column(name, justify="right")
    table.add_column("status", max_width=44)
    best = best_costs(list(runs))
    for i, row in enumerate(runs):
        record = as_record(row, best.get((row.instance, row.budget)))
        last = i + 1 == len(runs) or (runs[i + 1].instance, runs[i + 1].budget) != (
            row.instance,
            row.budget,
        )
        table.add_row(
            row.instance,
            f"{row.budget:g}",
            row.solver,
            *(_figure(record[key], 2) for key in ("first_s", "within_1_percent_s", "proof_s")),
            *(
                _figure(record[key], 3)
                for key in ("overhead_percent", "bound_percent", "gap_percent")
            ),
            _status(row),
            end_section=last,
        )
    return table


def _status(row: Run) -> str:
    """The solver's status, with the scope of its proof if that is not every schedule."""
    if row.error:
        return f"{row.status}: {row.error}"
    if row.bound_scope in (None, BoundScope.BASE_ORDER):
        return row.status
    return f"{row.status}, of {row.bound_scope.words}"


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def write_runs(runs: Sequence[Run], folder: Path, settings: dict[str, Any]) -> None:
    """``runs.csv``, a line for each run, and ``runs.json``, with every event and the machine."""
    best = best_costs(list(runs))
    records = [as_record(row, best.get((row.instance, row.budget))) for row in runs]
    if records:
        with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    data = {
        "circumstances": environment(),
        "settings": settings,
        "runs": [
            {**record, "moments": [asdict(moment) for moment in row.moments]}
            for record, row in zip(records, runs, strict=True)
        ],
    }
    (folder / "runs.json").write_text(json.dumps(data, indent=1), encoding="utf-8")


def environment() -> dict[str, Any]:
    """Machine, versions, command and time: what is needed to repeat a figure."""
    return {
        **machine(),
        "command": shlex.join(["python", "-m", "benchmarks.solvers", *sys.argv[1:]]),
        "versions": {name: version_of(name) for name in PACKAGES},
    }
