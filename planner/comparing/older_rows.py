"""Rows of comparison files that were written before rows had an outcome and a flag.

In such files, the error's text says how the row ended, and the note says whether its
schedule leaves eager's order. Only this module reads either from text.
"""

from __future__ import annotations

import re
from typing import Any

from ..comparison_record import RowOutcome
from .bound_text import OTHER_ORDER

_NO_ROOM = ("runs out of memory:", "DTR thrashes:", "out of memory when it ran:")
_EXCEPTION = re.compile(r"[A-Za-z_.]*(Error|Exception|Exit|Iteration|Warning)\b: ")


def with_outcome(row: Any) -> Any:
    """A row of a file with its outcome; anything else unchanged."""
    if not isinstance(row, dict):
        return row
    added: dict[str, Any] = {}
    if "outcome" not in row:
        added["outcome"] = str(_outcome(row))
    note = row.get("note")
    if "off_order" not in row:
        added["off_order"] = isinstance(note, str) and note.endswith(OTHER_ORDER)
        if added["off_order"]:
            added["note"] = str(note).removesuffix(OTHER_ORDER).removesuffix("; ")
    return {**row, **added}


def _outcome(row: dict[str, Any]) -> RowOutcome:
    error = str(row.get("error", ""))
    if row.get("predicted_step_us") is not None:
        return RowOutcome.OVER_BUDGET if row.get("fits") is False else RowOutcome.FOUND
    if not error:
        return RowOutcome.FOUND
    if "proven: nothing fits" in error:
        return RowOutcome.PROVEN_INFEASIBLE
    if "no schedule found" in error or "nothing found that fits" in error:
        return RowOutcome.NOTHING_FOUND
    if any(words in error for words in _NO_ROOM):
        return RowOutcome.OUT_OF_MEMORY
    return RowOutcome.FAILED if _EXCEPTION.match(error) else RowOutcome.NOT_APPLICABLE
