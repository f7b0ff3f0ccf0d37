"""Explain why a model could not be captured, in terms of the user's model."""

from __future__ import annotations

import re

from ..errors import CaptureError
from ..lines import is_machinery
from ..private_torch.fake_tensors import DataDependentOutputException, DynamicOutputShapeException

_TAKES_FUNCTIONS = re.compile(r"HigherOrderOperator (\w+)")
_NOT_FOLLOWED = (
    "{} is an operator that takes functions, as torch.cond does, and no plan follows those: write "
    "it in Python. An if or while on a tensor's value is followed, and checked in each step"
)
_DECIDED_BY_VALUE = (DataDependentOutputException, DynamicOutputShapeException)


def lack_values(failures: list[tuple[str, BaseException]]) -> bool:
    """Whether an attempt stopped at a value that was not known."""
    return any(isinstance(error, _DECIDED_BY_VALUE) for _, error in failures)


def explain_failures(failures: list[tuple[str, BaseException]]) -> str:
    """Return what stopped each attempt, and what to do about it."""
    reasons: dict[str, list[str]] = {}
    for how, error in failures:
        where = _user_frame(error) or next(iter(getattr(error, "__notes__", ())), None)
        first = next(iter(str(error).strip().splitlines()), "")
        name = "" if isinstance(error, CaptureError) else f"{type(error).__name__}: "
        taking_functions = _TAKES_FUNCTIONS.search(first)
        if taking_functions:
            name, first = "", _NOT_FOLLOWED.format(taking_functions[1])
        reasons.setdefault(f"{name}{first}{f' (at {where})' if where else ''}", []).append(how)
    lines = ["the model could not be captured as one graph:"]
    lines += [f"  {' and '.join(ways)}: {reason}" for reason, ways in reasons.items()]
    if lack_values(failures):
        lines.append(
            "  A branch or shape depends on a tensor's value, and the value is not known: "
            "the model or the sample is on meta (pass real ones), backward asks for it, or it "
            "comes from other processes (a collective). Otherwise use torch.where, pass the value "
            "as an argument, or plan the part of the model around it."
        )
    elif not any(isinstance(error, CaptureError) for _, error in failures):
        lines.append(
            "  Does an unplanned training step run, backward pass included? If it does, plan the "
            "part of the model around this line."
        )
    return "\n".join(lines)


def _user_frame(error: BaseException) -> str | None:
    place = None
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not is_machinery(name):
            place = f"{name}:{trace.tb_lineno} in {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return place
