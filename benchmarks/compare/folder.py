"""The folder of a run: its readable results, its failures, and its settings."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from planner.base.atomic_write import write_whole
from planner.comparing.comparison import Comparison
from planner.comparing.machine import machine, versions

from .match_peak_and_time import MatchedRow
from .paired_runs import PairedRun
from .solve_at_peaks import SolvedAtPeak

_Row = TypeVar("_Row", PairedRun, MatchedRow, SolvedAtPeak)
SETTINGS = "compare.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a folder holds, by model.

    Parameters
    ----------
    comparisons, at_peak, matches, paired_runs
        Those of the models that have them.
    failures
        Why the others failed, and why files cannot be read.
    """

    comparisons: dict[str, Comparison] = field(default_factory=dict)
    at_peak: dict[str, list[SolvedAtPeak]] = field(default_factory=dict)
    matches: dict[str, list[MatchedRow]] = field(default_factory=dict)
    paired_runs: dict[str, list[PairedRun]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def read(folder: Path, names: Iterable[str], failures: Mapping[str, str]) -> Found:
    """Read the results of these models from the folder.

    A damaged file counts as a failure, and the others are read. So does a model without
    results.

    Parameters
    ----------
    failures
        Known failures.
    """
    found = Found(failures=dict(failures))
    for name in names:
        try:
            found.comparisons[name] = Comparison.load(folder / f"{name}.json")
        except FileNotFoundError:
            _tell(found, name, f"{folder} has no {name}.json")
            continue
        except (OSError, ValueError, TypeError, ArithmeticError) as error:
            _tell(found, name, f"{name}.json cannot be read: {error}")
            continue
        _read_rows(folder / f"{name}_settled.json", _at_peak, found.at_peak, name, found)
        _read_rows(folder / f"{name}_matched.json", _matched, found.matches, name, found)
        _read_rows(folder / f"{name}_duels.json", _paired_run, found.paired_runs, name, found)
    return found


def read_failures(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The failures of these models that an earlier run stored."""
    path = folder / SETTINGS
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        kept = {str(row["model"]): str(row["failure"]) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return {path.name: f"cannot be read, so that failures of its run are not known: {error!r}"}
    return {name: kept[name] for name in names if name in kept}


def write_settings(folder: Path, settings: Mapping[str, Any], failures: Mapping[str, str]) -> None:
    """Write the request, the machine, and the failures."""
    around = {
        **machine(),
        "command": shlex.join(["python", "-m", "benchmarks.compare", *sys.argv[1:]]),
        "versions": versions(),
    }
    rows = [{"model": name, "failure": why} for name, why in failures.items()]
    data = {"circumstances": around, "settings": dict(settings), "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SETTINGS, json.dumps(data, indent=1) + "\n")


def _read_rows(
    path: Path,
    read_row: Callable[[dict[str, Any]], _Row],
    into: dict[str, list[_Row]],
    name: str,
    found: Found,
) -> None:
    try:
        into[name] = [read_row(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError) as error:
        _tell(found, name, f"{path.name} cannot be read: {error!r}")


def _at_peak(row: dict[str, Any]) -> SolvedAtPeak:
    return SolvedAtPeak(**{**row, "strategies": tuple(row["strategies"])})


def _matched(row: dict[str, Any]) -> MatchedRow:
    return MatchedRow(**row)


def _paired_run(row: dict[str, Any]) -> PairedRun:
    interval = row["interval"]
    return PairedRun(**{**row, "interval": None if interval is None else tuple(interval)})


def _tell(found: Found, name: str, why: str) -> None:
    before = found.failures.get(name)
    found.failures[name] = f"{before}; {why}" if before else why
