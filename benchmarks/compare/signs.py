"""Signs for table cells in which a strategy has no figure, and formats of bounds."""

from __future__ import annotations

import math

from planner.comparison_record import ComparisonRow, RowOutcome

OVER = "–"
NOTHING_FITS = "×"
NOTHING_FOUND = "?"
NOT_APPLICABLE = "n/a"
FAILED = "failed"
OFF_ORDER = "†"

LEGEND = (
    f"{OVER}: its peak is over the budget; {NOTHING_FITS}: proven that nothing fits; "
    f"{NOTHING_FOUND}: nothing found within the limit, and nothing proven; {NOT_APPLICABLE}: does "
    f"not apply to this step; {FAILED}: ended in an error; empty: not asked, or has no choice of "
    f"its own; {OFF_ORDER}: its first runs leave eager's order, so that it may be below the bound. "
    "Bounds, and what is proven, speak of every schedule whose first runs keep eager's order, and "
    "are rounded down."
)

_SIGNS = {
    RowOutcome.FOUND: "",
    RowOutcome.OVER_BUDGET: OVER,
    RowOutcome.PROVEN_INFEASIBLE: NOTHING_FITS,
    RowOutcome.NOTHING_FOUND: NOTHING_FOUND,
    RowOutcome.OUT_OF_MEMORY: OVER,  # what it would do does not fit
    RowOutcome.NOT_APPLICABLE: NOT_APPLICABLE,
    RowOutcome.FAILED: FAILED,
}


def sign(row: ComparisonRow) -> str:
    """A sign for why a row has no figure at its budget; ``""`` if it has one."""
    return _SIGNS[row.outcome]


def off_order(row: ComparisonRow) -> str:
    """A mark if bounds do not cover a row's schedule, or if its figures would disprove one."""
    disproves = row.gap is not None and row.gap < 0
    return OFF_ORDER if disproves or row.off_order else ""


def rounded_down(value: float, digits: int) -> str:
    """A lower bound with so many decimals, rounded so that it remains a lower bound."""
    scale = 10**digits
    return f"{math.floor(value * scale + 1e-9) / scale:.{digits}f}"


def share_rounded_down(value: float, digits: int = 2) -> str:
    """The same in per cent."""
    return f"{rounded_down(100 * value, digits)}%"


def mb(num_bytes: int | None) -> str:
    """A size, to a tenth of a megabyte."""
    return OVER if num_bytes is None else f"{num_bytes / 1e6:.1f} MB"


def mb_rounded_down(num_bytes: int) -> str:
    """The same, rounded down, for lower bounds."""
    return f"{rounded_down(num_bytes / 1e6, 1)} MB"


def one_line(text: str, longest: int = 200) -> str:
    """An error as a cell: in one line, and shortened."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= longest else line[: longest - 1] + "…"
