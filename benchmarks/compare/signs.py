"""What stands in a table's cell where a strategy has no figure there, and figures of bounds."""

from __future__ import annotations

import math
import re

from planner.comparing.bound_text import OTHER_ORDER
from planner.comparison_record import ComparisonRow

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

_PROVEN = ("proven: nothing fits",)
_NOT_FOUND = ("no schedule found", "nothing found that fits")
_NO_ROOM = ("runs out of memory:", "DTR thrashes:")
_EXCEPTION = re.compile(r"[A-Za-z_.]*(Error|Exception|Exit|Iteration|Warning)\b: ")


def sign(row: ComparisonRow) -> str:
    """Why a row has no figure at its budget; ``""`` where it has one."""
    if row.predicted_step_us is not None:
        return OVER if row.fits is False else ""
    if any(words in row.error for words in _PROVEN):
        return NOTHING_FITS
    if any(words in row.error for words in _NOT_FOUND):
        return NOTHING_FOUND
    if any(words in row.error for words in _NO_ROOM):
        return OVER  # what it would do does not fit
    return FAILED if _EXCEPTION.match(row.error) else NOT_APPLICABLE


def off_order(row: ComparisonRow) -> str:
    """A mark where bounds do not speak of a row's schedule, or its figures would disprove one."""
    disproves = row.gap is not None and row.gap < 0
    return OFF_ORDER if disproves or OTHER_ORDER in row.note else ""


def rounded_down(value: float, digits: int) -> str:
    """A lower bound in so many decimals that is one still."""
    scale = 10**digits
    return f"{math.floor(value * scale + 1e-9) / scale:.{digits}f}"


def share_rounded_down(value: float, digits: int = 2) -> str:
    """The same in per cent."""
    return f"{rounded_down(100 * value, digits)}%"


def mb(num_bytes: int | None) -> str:
    """A size, to a tenth of a megabyte."""
    return OVER if num_bytes is None else f"{num_bytes / 1e6:.1f} MB"


def mb_rounded_down(num_bytes: int) -> str:
    """A size that nothing is below."""
    return f"{rounded_down(num_bytes / 1e6, 1)} MB"


def one_line(text: str, longest: int = 200) -> str:
    """An error as a cell: in one line, and not endless."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= longest else line[: longest - 1] + "…"
