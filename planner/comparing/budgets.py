"""The budgets of a comparison: shares, bytes, or the peak of a strategy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import count as count_from
from numbers import Integral, Real
from typing import Literal

from graph_capture.suggestions import did_you_mean
from graph_capture.units import parse_bytes

NUM_DEFAULT_BUDGETS = 8

LEAST_BARE_BYTES = 4096
"""The least number without a unit that is read as bytes: ``12`` would mean gigabytes."""

AskedBudget = float | int | str

_PERCENT = re.compile(r"([+-]?[0-9]*\.?[0-9]+)\s*%")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+)")
_EXAMPLES = "write 0.6 or '60%' (of the unplanned peak), 12_000_000_000 or '12GB', or a strategy"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBudget:
    """A valid budget, before the step's peaks are known.

    Parameters
    ----------
    label
        The label in a table.
    kind
        What ``amount`` is: a share of the unplanned peak, bytes, or nothing, if the
        budget is the peak of the strategy that ``label`` names.
    amount
        The figure.
    """

    label: str
    kind: Literal["share", "bytes", "strategy"]
    amount: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedBudget:
    """A budget in bytes, with its text as requested."""

    label: str
    num_bytes: int


def read_budgets(
    budgets: Iterable[AskedBudget], strategies: Container[str]
) -> tuple[ReadBudget, ...]:
    """Read and check the requested budgets.

    Parameters
    ----------
    budgets
        Shares of the unplanned peak (``0.6``, ``"60%"``), bytes (``12_000_000_000``,
        ``"12GB"``), or names of strategies. A number without a unit is bytes from
        :data:`LEAST_BARE_BYTES` on, and an error below that.
    strategies
        The names that may be used.

    Raises
    ------
    ValueError
        When one is none of these, or two are the same.

    Examples
    --------
    >>> [b.label for b in read_budgets([0.6, "12GB", 4096, "none"], {"none"})]
    ['60%', '12GB', '4096B', 'none']
    """
    if isinstance(budgets, (str, bytes)) or not isinstance(budgets, Iterable):
        raise ValueError(f"budgets is a sequence of budgets, got {budgets!r}: write [{budgets!r}]")
    read = tuple(_read(budget, strategies) for budget in budgets)
    labels = [budget.label for budget in read]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"budget {label!r} is given twice")
    return read


def in_bytes(
    read: Sequence[ReadBudget], *, unplanned_peak_bytes: int, own_peak_bytes: Callable[[str], int]
) -> tuple[NamedBudget, ...]:
    """Convert budgets to bytes.

    Parameters
    ----------
    unplanned_peak_bytes
        The peak that shares refer to.
    own_peak_bytes
        Returns the peak of a strategy at its own choice, by its name.
    """

    def amount(budget: ReadBudget) -> int:
        if budget.kind == "share":
            return math.floor(budget.amount * unplanned_peak_bytes)
        return int(budget.amount) if budget.kind == "bytes" else own_peak_bytes(budget.label)

    return tuple(NamedBudget(label=b.label, num_bytes=amount(b)) for b in read)


def even_budgets(
    least_bytes: int, unplanned_peak_bytes: int, count: int = NUM_DEFAULT_BUDGETS
) -> tuple[NamedBudget, ...]:
    """Space budgets evenly from the least possible peak to the unplanned one, both included.

    Labels give the share of the unplanned peak, with enough digits to tell them apart.

    >>> [(b.label, b.num_bytes) for b in even_budgets(40, 100, 4)]
    [('least', 40), ('60.0%', 60), ('80.0%', 80), ('100%', 100)]
    """
    span = max(0, unplanned_peak_bytes - least_bytes)
    amounts = sorted({least_bytes + span * i // (count - 1) for i in range(count)})
    labels = ["least", *_shares(amounts[1:-1], unplanned_peak_bytes), "100%"]
    return tuple(
        NamedBudget(label=label, num_bytes=n)
        for label, n in zip(labels[: len(amounts)], amounts, strict=True)
    )


def _shares(amounts: Sequence[int], whole: int) -> list[str]:
    """Percentages of ``whole``, all different, and none that rounds to 100 %."""
    percentages = [Decimal(100 * amount) / whole for amount in amounts]
    for digits in count_from(1):
        written = [f"{percentage:.{digits}f}" for percentage in percentages]
        if len({Decimal(100), *map(Decimal, written)}) == len(written) + 1:
            break
    return [f"{text}%" for text in written]


def _read(budget: AskedBudget, strategies: Container[str]) -> ReadBudget:
    if isinstance(budget, str):
        return _read_text(budget.strip(), strategies)
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise ValueError(f"not a budget: {budget!r}; {_EXAMPLES}")
    if isinstance(budget, Integral):
        if int(budget) <= 1:
            raise ValueError(
                f"a budget of {budget!r} says neither a share nor bytes: a share is a float such "
                "as 1.0, bytes are a whole number above 1"
            )
        if int(budget) < LEAST_BARE_BYTES:
            raise ValueError(
                f"a budget of {budget!r} would be bytes, fewer than any training step needs: "
                f"write '{budget}GB' for gigabytes, '{budget}B' if bytes are meant"
            )
        return ReadBudget(label=f"{int(budget)}B", kind="bytes", amount=int(budget))
    return _share(float(budget), budget)


def _read_text(text: str, strategies: Container[str]) -> ReadBudget:
    if text in strategies:
        return ReadBudget(label=text, kind="strategy")
    percent = _PERCENT.fullmatch(text)
    if percent is not None:
        return _share(float(percent[1]) / 100, text)
    if _INTEGER.fullmatch(text):
        return _read(int(text), strategies)
    if _FRACTION.fullmatch(text):
        return _share(float(text), text)
    try:
        num_bytes = parse_bytes(text)
    except ValueError as error:
        names = sorted(strategies) if isinstance(strategies, Iterable) else []
        raise ValueError(
            f"not a budget: {text!r} ({error}); {did_you_mean(text, names)}{_EXAMPLES}, one of: "
            f"{', '.join(names)}"
        ) from error
    return ReadBudget(label=text.replace(" ", ""), kind="bytes", amount=num_bytes)


def _share(share: float, asked: object) -> ReadBudget:
    if not 0 < share <= 1:
        raise ValueError(
            f"a share of the unplanned peak is above 0 and at most 1, got {asked!r}; {_EXAMPLES}"
        )
    return ReadBudget(label=f"{100 * share:.6g}%", kind="share", amount=share)
