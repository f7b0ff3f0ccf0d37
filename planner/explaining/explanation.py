"""A plan explained, in figures and in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graph_capture.printable import printable
from graph_capture.units import format_bytes, format_us
from solvers.scopes import short_words

from ..plan_record import PeakMemory
from .holders import Holder, Why
from .more_memory import MoreMemory
from .recomputations import Recomputation

NUM_LINES = 12
"""Of each table, unless more are asked for."""

_NUMBERED = re.compile(r"(?<=\.)\d+(?=\.|$)")
_CALL = re.compile(r"^(?:\w+\.)?(\w+?)_?(?:\.\w+)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What holds memory at a plan's peak, what it recomputes, and what more memory would buy.

    Parameters
    ----------
    peak
        The predicted peak: how much, of what, and where in the step.
    peak_us, step_us
        When the operator at the peak ends, and the length of the planned step, in
        microseconds.
    workspace_bytes
        Scratch memory of that operator's kernel.
    holders
        What is in memory then, the largest first. Together with ``workspace_bytes`` it is
        the peak.
    recomputations
        What runs again, the dearest first.
    more
        A solve with a larger budget; ``None`` where the plan recomputes nothing, or no
        such solve was asked for.
    """

    peak: PeakMemory
    peak_us: float
    step_us: float
    workspace_bytes: int
    holders: tuple[Holder, ...]
    recomputations: tuple[Recomputation, ...]
    more: MoreMemory | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, texts and lists, ready for JSON."""
        return {
            "peak": {**asdict(self.peak), "by_category": dict(self.peak.by_category)},
            "peak_us": self.peak_us,
            "step_us": self.step_us,
            "workspace_bytes": self.workspace_bytes,
            "holders": [asdict(holder) for holder in self.holders],
            "recomputations": [
                {**asdict(one), "calls": list(one.calls)} for one in self.recomputations
            ],
            "more": None if self.more is None else asdict(self.more),
        }

    def report(self, num_lines: int = NUM_LINES) -> str:
        """Return the tables in words, with so many lines each; layers of one kind share a line."""
        lines = [*self._peak(num_lines), "", *self._again(num_lines), "", *self._more()]
        return "\n".join(map(printable, lines))  # names in it may come from a file

    def __str__(self) -> str:
        return self.report()

    def _peak(self, num_lines: int) -> list[str]:
        peak = self.peak
        where = peak.module_path or peak.source or "the training loop"
        at = f", {self.peak_us / self.step_us:.0%} into the step" if self.step_us else ""
        lines = [
            f"Peak of {format_bytes(peak.total_bytes)} at {peak.operator} ({peak.phase}, "
            f"{where}){at}"
        ]
        rows = [
            _held(group, self.step_us) for group in _grouped(self.holders, _kind_of_holder, _bytes)
        ]
        if self.workspace_bytes:
            rows.append((self.workspace_bytes, "scratch of its kernel", "in use"))
        rows.sort(key=lambda row: -row[0])
        for num_bytes, what, why in rows[:num_lines]:
            lines.append(f"  {format_bytes(num_bytes):>9}  {what}")
            lines.append(f"  {'':>9}    {why}")
        rest = rows[num_lines:]
        if rest:
            total = format_bytes(sum(num_bytes for num_bytes, *_ in rest))
            lines.append(f"  {total:>9}  {len(rest)} other kind{'s' * (len(rest) > 1)}")
        return lines

    def _again(self, num_lines: int) -> list[str]:
        if not self.recomputations:
            return ["Recomputes nothing"]
        total_us = sum(one.time_us for one in self.recomputations)
        runs = sum(one.num_runs for one in self.recomputations)
        lines = [
            f"Recomputes {runs} runs in {format_us(total_us)} of {format_us(self.step_us)}; the "
            "dearest, by line"
        ]
        groups = _grouped(self.recomputations, _kind_of_line, _time)
        for group in groups[:num_lines]:
            first = group[0]
            calls = list(dict.fromkeys(_short(call) for one in group for call in one.calls))
            place = first.source or "unknown line"
            lines.append(
                f"  {format_us(sum(map(_time, group))):>9}  {sum(one.num_runs for one in group)} × "
                f"{', '.join(calls[:4])}{', …' if len(calls) > 4 else ''}"
                f"{_modules([one.module_path for one in group])} ({place})"
            )
        rest = groups[num_lines:]
        if rest:
            total = format_us(sum(one.time_us for group in rest for one in group))
            lines.append(f"  {total:>9}  {len(rest)} other line{'s' * (len(rest) > 1)}")
        return lines

    def _more(self) -> list[str]:
        more = self.more
        if more is None:
            nothing = "Nothing is recomputed: more memory buys nothing"
            return [nothing] if not self.recomputations else []
        share = more.saved_us / self.step_us if self.step_us else 0.0
        bought = (
            f"{format_us(more.saved_us)} of a step of {format_us(self.step_us)} ({share:.2%})"
            if more.saved_us > 0
            else "nothing that was found"
        )
        return [
            f"{format_bytes(more.extra_bytes)} more would save {bought}: solved again within "
            f"{format_bytes(more.budget_bytes)}, {more.status}, {more.solve_s:.1f} s",
            f"  at most {format_us(max(0.0, more.at_most_us))} can be saved there, by the bound of "
            "that solve, among",
            f"  {short_words(more.bound_scope)}",
        ]


def _held(group: Sequence[Holder], step_us: float) -> tuple[int, str, str]:
    """Return bytes, what it is, and why it is there."""
    first = group[0]
    num_bytes = sum(map(_bytes, group))
    count = f" × {len(group)}" if len(group) > 1 else ""
    category = first.category.replace("_", " ")
    if first.why is Why.RESIDENT:
        return num_bytes, f"{category}{count}", "resident: there all step long"
    what = f"{category} of {_short(first.call)}{count}{_modules([h.module_path for h in group])}"
    return num_bytes, what, _why(group, step_us)


def _why(group: Sequence[Holder], step_us: float) -> str:
    first = group[0]
    if first.why is Why.IN_USE:
        return "in use: read or made by the operator at the peak"
    if first.why is Why.HELD:
        return "held to the end of the step, for the training loop"
    modules = _modules([holder.last_used_module for holder in group], before=" of ")
    until = (
        f"last used by {_name(first.last_used_by)} in the {first.last_used_phase}{modules}"
        f"{_when([holder.freed_us for holder in group], step_us)}"
    )
    if first.why is Why.ONLY_ONCE:
        return f"cannot be made again ({first.pinned or 'must run exactly once'}); {until}"
    again_us = sum(holder.recompute_us or 0.0 for holder in group)
    kept = "saved" if first.why is Why.SAVED else "recomputed already"
    it = "it" if len(group) == 1 else "each of them"
    return f"{kept}: to make {it} again would take {format_us(again_us)}{_beside(group)}; {until}"


def _beside(group: Sequence[Holder]) -> str:
    """Say what else would have to be kept to make storages again."""
    needed = {one.made_by: one for holder in group for one in holder.also_needed}
    if not needed:
        return ""
    calls = list(dict.fromkeys(_short(one.call) for one in needed.values()))
    reasons = dict.fromkeys(one.pinned for one in needed.values())
    return (
        f", and needs {format_bytes(sum(one.size_bytes for one in needed.values()))} kept that are "
        f"made only once: {', '.join(calls[:3])}{', …' if len(calls) > 3 else ''}"
        f"{_modules([one.module_path for one in needed.values()])} ({'; '.join(reasons)})"
    )


def _when(times_us: Sequence[float], step_us: float) -> str:
    """Say at which share of the step, or from which to which.

    >>> _when([52.0, 97.0], 100.0)
    ', at 52 to 97% of the step'
    """
    if not step_us:
        return ""
    first, last = (f"{100 * time_us / step_us:.0f}" for time_us in (min(times_us), max(times_us)))
    return f", at {first}% of the step" if first == last else f", at {first} to {last}% of the step"


def _grouped(items: Iterable[Any], kind: Any, size: Any) -> list[list[Any]]:
    """Return items of one kind together, the largest kind first."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    return sorted(groups.values(), key=lambda group: -sum(map(size, group)))


def _kind_of_holder(holder: Holder) -> tuple[str, ...]:
    if holder.why is Why.RESIDENT:
        return (holder.why, holder.category)
    return (
        holder.why,
        holder.category,
        _short(holder.call),
        _pattern(holder.module_path),
        _name(holder.last_used_by),
        _pattern(holder.last_used_module),
        holder.pinned,
        *dict.fromkeys(needed.pinned for needed in holder.also_needed),
    )


def _kind_of_line(one: Recomputation) -> tuple[str, str]:
    return _pattern(one.module_path), one.source


def _bytes(holder: Holder) -> int:
    return holder.size_bytes


def _time(one: Recomputation) -> float:
    return one.time_us


def _pattern(module_path: str) -> str:
    """Write the number of a layer as ``*``.

    >>> _pattern("transformer.h.11.mlp")
    'transformer.h.*.mlp'
    """
    return _NUMBERED.sub("*", module_path)


def _modules(paths: Sequence[str], before: str = " in ") -> str:
    """Name a module, or the pattern that several share."""
    different = set(paths) - {""}
    if not different:
        return ""
    return before + (different.pop() if len(different) == 1 else _pattern(paths[0]))


def _short(call: str) -> str:
    """Name a call without namespace and overload; of several the first and the last.

    >>> _short("aten.native_layer_norm.default"), _short("aten.empty_like.default+aten.mul_.Scalar")
    ('native_layer_norm', 'empty_like … mul')
    """
    parts = [_CALL.sub(r"\1", part) for part in call.split("+")]
    return parts[0] if len(parts) == 1 else f"{parts[0]} … {parts[-1]}"


def _name(operator: str) -> str:
    """Name an operator without the number that tells it from others.

    >>> _name("addmm_17")
    'addmm'
    """
    return re.sub(r"_\d+$", "", operator)
