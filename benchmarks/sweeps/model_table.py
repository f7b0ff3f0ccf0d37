"""The model sweep's table of record."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from .environment import environment

_NOT_TRAINED = ("skipped", "no eager", "not repeatable")
_ORDER = (
    "green",
    "refused",
    "step refused",
    "crash",
    "other bits",
    "above budget",
    "mispredicted",
    "died",
    "no eager",
    "not repeatable",
    "skipped",
)
UNPLANNED_TOLERANCE = 0.01
BEFORE = (
    "At the first sweep, of 192 subjects, 168 trained in eager, 117 were planned (70%), 110 were "
    "green, 2 computed other bits and 3 took more than their budget."
)
OF_UNPLANNED = (
    "- An unplanned peak is predicted for the step without checkpointing of the model's own, which "
    'a plan replaces: that is above what such a model takes ("own checkpointing"). It knows '
    "nothing of tensors that Python's local variables hold for longer than they are needed: that "
    "is below. On the CPU the state of a generator, 5 kB, is counted before each draw, and scratch "
    "of a matrix exponential is that of a large matrix: small models are predicted too high."
)
_EXAMPLES = 12


def model_table(records: list[dict[str, Any]]) -> str:
    """Counts, refusals by class, and a line for each model that is not green."""
    trained = [r for r in records if r["outcome"] not in _NOT_TRAINED]
    planned = [r for r in trained if "budget_bytes" in r]
    lines = [
        "# Model sweep",
        "",
        "`make sweep-models`: each model is built tiny with random weights, planned at 70 % of "
        "eager's measured peak (else at the least budget there is), trained for two steps beside "
        "eager with every bit compared, and measured.",
        "",
        environment(),
        "",
        f"{len(trained)} of {len(records)} subjects train in eager; {len(planned)} of these are "
        f"planned ({_percent(len(planned), len(trained))}). {BEFORE}",
        "",
        *_counts(records),
        "",
        *_errors(planned),
        "",
        OF_UNPLANNED,
        "",
        "## Refused, by class",
        "",
        *_classes([r for r in trained if r["outcome"] == "refused"]),
        "",
        "## What failed otherwise",
        "",
        *_failures([r for r in trained if r["outcome"] not in ("green", "refused")]),
        "",
        "## Not judged: builds or trains in eager only with what the sweep does not know",
        "",
        *_classes([r for r in records if r["outcome"] in _NOT_TRAINED]),
    ]
    return "\n".join(lines) + "\n"


def _counts(records: list[dict[str, Any]]) -> list[str]:
    groups = sorted({r["name"].partition("/")[0] for r in records})
    outcomes = [o for o in _ORDER if any(r["outcome"] == o for r in records)]
    lines = ["| library | " + " | ".join(outcomes) + " |", "|---|" + "---:|" * len(outcomes)]
    for group in [*groups, "all"]:
        counts = Counter(
            r["outcome"] for r in records if group in ("all", r["name"].partition("/")[0])
        )
        lines.append(f"| {group} | " + " | ".join(str(counts[o]) for o in outcomes) + " |")
    return lines


def _errors(planned: list[dict[str, Any]]) -> list[str]:
    if not planned:
        return ["Nothing was planned."]
    measured = [abs(r["planned_error"]) for r in planned if "planned_error" in r]
    off = sorted(
        (r for r in planned if abs(r["unplanned_error"]) > UNPLANNED_TOLERANCE),
        key=lambda r: -abs(r["unplanned_error"]),
    )
    free = [r for r in planned if r["branch_free"]]
    bits = sum(r["outcome"] == "other bits" for r in free)
    lines = [
        f"- largest error of a planned peak: {max(measured, default=0):.2%} of {len(measured)}",
        f"- unplanned peak off by more than {UNPLANNED_TOLERANCE:.0%}: "
        f"{len(off)} of {len(planned)}",
        f"- plans that say they follow the path for compilers: {len(free)}, "
        f"of which {bits} compute other bits",
    ]
    lines += [f"  - {r['name']}: {r['unplanned_error']:+.1%}" for r in off[:_EXAMPLES]]
    if off[_EXAMPLES:]:
        lines.append(f"  - and {len(off) - _EXAMPLES} more")
    return lines


def _classes(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return ["None."]
    classes: dict[str, list[str]] = {}
    for record in records:
        classes.setdefault(refusal_class(record.get("error", "")), []).append(record["name"])
    lines = ["| class | models | which |", "|---|---:|---|"]
    for text, names in sorted(classes.items(), key=lambda item: (-len(item[1]), item[0])):
        shown = ", ".join(name.partition("/")[2] for name in names[:_EXAMPLES])
        more = f" and {len(names) - _EXAMPLES} more" if names[_EXAMPLES:] else ""
        lines.append(f"| {_cell(text)} | {len(names)} | {_cell(shown + more)} |")
    return lines


def refusal_class(error: str) -> str:
    """An error without the details of one model: numbers, places, names.

    Examples
    --------
    >>> refusal_class("CaptureError: stopped: item (at /a/modeling_x.py:12 in forward) Write it")
    'CaptureError: stopped: item (in forward)'
    """
    place = re.search(r"\(at \S+?:\d+ in (\w+)\)", error)
    text = error[: place.start()] if place else error
    text = re.sub(r"\S*/(\S+\.py)", r"\1", text)
    text = re.sub(r"\b\d[\d,.]*\b", "N", text)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", text)
    text = re.sub(r"\(\w+\.py:N\)", "", text)
    text = text.removeprefix("DoesNotTrain: ").strip()[:160].strip()
    return f"{text} (in {place.group(1)})" if place else text


def _failures(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return ["None."]
    lines = ["| model | outcome | what |", "|---|---|---|"]
    for record in sorted(records, key=lambda r: (r["outcome"], r["name"])):
        what = record.get("error", "")[:200]
        lines.append(f"| {record['name']} | {record['outcome']} | {_cell(what)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"
