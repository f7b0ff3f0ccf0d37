"""One cell of the table, the file that keeps cells, and what every cell must show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from planner.base.atomic_write import write_whole
from planner.comparing.machine import machine, versions

MOST_OFF = 0.02
"""Share of the measured peak that the predicted one may be off."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What was asked for and what came of it.

    Parameters
    ----------
    model, asked
        Name the cell.
    budget_bytes, predicted_bytes, peak_bytes
        Of ours the budget and the plan's peak; the measured peak.
    ratio
        PyTorch's ``activation_memory_budget``.
    bits_equal, error
        Gradients against the compiled step without a budget.
    float64_error
        Gradients against the step compiled in float64.
    slope_error
        Gradients against slopes of the loss, where the loss is of other dropout masks than the
        step without a budget.
    is_right
        Equal bits, or about as near to float64 as unbudgeted compilations are, or to the slopes
        of the loss.
    time_ratio
        Against the step without a budget, by alternating pairs; ``None`` if not measured.
    first_step_s, planning_s, solve_s
        Seconds of the first step; of them until the partition was there; of these solving.
    overhead, gap, step_us, num_recomputed
        Of the plan.
    for_times
        Whether the cell is no part of the table of budgets, but was asked for its time.
    failure
        Why there is no step.
    """

    model: str
    asked: str
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    peak_bytes: int | None = None
    ratio: float | None = None
    bits_equal: bool | None = None
    error: float | None = None
    float64_error: float | None = None
    slope_error: float | None = None
    is_right: bool | None = None
    time_ratio: float | None = None
    first_step_s: float | None = None
    planning_s: float | None = None
    solve_s: float | None = None
    overhead: float | None = None
    gap: float | None = None
    step_us: float | None = None
    num_recomputed: int | None = None
    for_times: bool | None = None
    failure: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether a budget in bytes was asked for."""
        return self.budget_bytes is not None


class Cells:
    """Cells of a file, which is written again after each one; a run goes on where one ended.

    The settings, the machine and the versions are those of the first run.
    """

    def __init__(self, path: Path | None, settings: dict[str, object]) -> None:
        self._path = path
        self.settings: dict[str, Any] = {
            **settings,
            "machine": machine(),
            "versions": dict(versions()),
        }
        self._found: dict[tuple[str, str], Cell] = {}
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            self.settings = kept["settings"]
            for row in kept["cells"]:
                self._note(Cell(**row))

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._found.values())

    def get(self, model: str, asked: str) -> Cell | None:
        """A cell that is there."""
        return self._found.get((model, asked))

    def add(self, cell: Cell) -> Cell:
        """Keep a cell."""
        self._note(cell)
        if self._path is not None:
            rows = [{k: v for k, v in asdict(c).items() if v not in (None, "")} for c in self]
            text = json.dumps({"settings": self.settings, "cells": rows}, indent=1) + "\n"
            write_whole(self._path, text)
        return cell

    def _note(self, cell: Cell) -> None:
        self._found[cell.model, cell.asked] = cell


def complaints(cells: Sequence[Cell]) -> list[str]:
    """What cells of one model do not show, one sentence each."""
    found = []
    ours = sorted((c for c in cells if c.is_ours), key=lambda c: c.budget_bytes or 0)
    for cell in ours:
        name = f"{cell.model}, {cell.asked}"
        if cell.failure:
            found.append(f"{name}: {cell.failure}")
            continue
        assert cell.peak_bytes is not None
        assert cell.predicted_bytes is not None
        assert cell.budget_bytes is not None
        if not cell.is_right:
            found.append(f"{name}: gradients are wrong, error {cell.float64_error}")
        if cell.slope_error is not None:
            found.append(f"{name}: other dropout masks than without a budget")
        if cell.peak_bytes > cell.budget_bytes:
            found.append(f"{name}: {cell.peak_bytes} bytes are above {cell.budget_bytes}")
        if abs(cell.peak_bytes - cell.predicted_bytes) > MOST_OFF * cell.peak_bytes:
            found.append(f"{name}: predicted {cell.predicted_bytes}, measured {cell.peak_bytes}")
    done = [c for c in ours if not c.failure]
    for lower, higher in pairwise(done):
        assert lower.step_us is not None
        assert higher.step_us is not None
        if higher.step_us > lower.step_us * (1 + (higher.gap or 0.0)):
            found.append(f"{higher.model}, {higher.asked}: slower than with {lower.asked}")
    return found


__all__ = ["MOST_OFF", "Cell", "Cells", "complaints"]
