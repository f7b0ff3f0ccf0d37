"""The loop sweep's table of record."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .environment import environment
from .verdicts import BROKEN, FINE

_LONGEST = 60


def loop_table(records: list[dict[str, Any]]) -> str:
    """Counts of verdicts, and a line for each loop that broke the promise."""
    counts = Counter(record["outcome"] for record in records)
    order = [*FINE, *BROKEN, "died"]
    policies = sorted({r["loop"]["policy"] for r in records if "loop" in r})
    lines = [
        "# Loop sweep",
        "",
        "`make sweep-loops`: a seeded loop of changes and steps runs on a planned model and on its "
        "unplanned twin. After each step the loss, every gradient, parameter and buffer and the "
        "generator are compared.",
        "",
        environment(),
        "",
        f"{len(records)} loops, {sum(counts[v] for v in FINE)} as promised.",
        "",
        "| policy | " + " | ".join(order) + " |",
        "|---|" + "---:|" * len(order),
    ]
    for policy in [*policies, "all"]:
        chosen = Counter(
            r["outcome"] for r in records if policy in ("all", r.get("loop", {}).get("policy"))
        )
        lines.append(f"| {policy} | " + " | ".join(str(chosen[v]) for v in order) + " |")
    over = [r for r in records if r.get("over_budget", 0) > 1]
    quiet = [r for r in over if not r.get("over_said")]
    lines += [
        "",
        f"Peak of a step above the budget: {len(over)} loops, {len(quiet)} without a word.",
    ]
    lines += _steps(quiet)
    lines += ["", "## Loops that broke the promise", ""]
    broken = [r for r in records if r["outcome"] not in FINE]
    if not broken:
        return "\n".join([*lines, "None."]) + "\n"
    lines += ["| loop | verdict | what |", "|---|---|---|"]
    for r in broken[:_LONGEST]:
        words = (r.get("words") or r.get("error", ""))[:160].replace("|", "\\|")
        lines.append(f"| {r['name']}: {r.get('text', '')} | {r['outcome']} | {words} |")
    if broken[_LONGEST:]:
        lines.append(f"| and {len(broken) - _LONGEST} more | | |")
    return "\n".join(lines) + "\n"


def _steps(records: list[dict[str, Any]]) -> list[str]:
    """The largest peak by the step that had it."""
    largest: dict[str, float] = {}
    for r in records:
        largest[r["over_at"]] = max(largest.get(r["over_at"], 0.0), r["over_budget"])
    if not largest:
        return []
    rows = sorted(largest.items(), key=lambda item: -item[1])
    return ["", "| step | of the budget |", "|---|---:|", *(f"| {s} | {v:.2f} |" for s, v in rows)]
