"""Judge one case of the operator sweep: plan it, run it, and compare it with eager."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graph_capture.errors import CaptureError
from planner import InfeasibleBudgetError, Plan, optimize
from planner.base.training_step import train_step

from .operator_cases import Case, NoCase, loss_of, strides_of, subject_of

OUTCOMES = (
    "green",
    "prediction off",
    "refused",
    "wrong bits",
    "other strides",
    "above the budget",
    "raises later",
    "crashed",
    "no case",
)
"""Outcomes of a case; the goal is none of ``"wrong bits"`` to ``"crashed"``."""

TOLERANCE = 0.01
"""Tolerance of a planned peak; the unplanned peak's error is recorded but not judged."""

SMALLEST_BYTES = 256
"""Smallest error that counts: one per cent of a few kB is less than the numbers of one call."""

_SEED = 1
_STEPS = 2

_CLASSES = (
    (
        "value decides a branch or shape",
        r"DataDependent|DynamicOutputShape|depends on (a tensor's|values)",
    ),
    ("sparse or nested", r"layout torch\.(sparse|jagged|mkldnn)"),
    ("unseen tensor", r"entered the step unseen"),
    ("requires grad, no parameter", r"requires grad is used in forward"),
    ("cannot be recorded", r"cannot be recorded"),
    ("seeds the generator", r"seeds the random generator|from a generator of"),
    ("two outputs of one call written", r"memory that two outputs of one call share"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The verdict on a case.

    Parameters
    ----------
    case
        Its name.
    outcome
        One of :data:`OUTCOMES`.
    why
        The class of a refusal, or what is wrong.
    least_bytes, unplanned_bytes
        The least budget, and the predicted peak of the unplanned step.
    worst_over_bytes
        How far a measured peak is above its budget; negative if it is below.
    unplanned_error
        Measured over predicted peak of the unplanned step, minus one.
    took_s
        Wall time of the case.
    detail
        The refusal in full.
    """

    case: str
    outcome: str
    why: str = ""
    least_bytes: int | None = None
    unplanned_bytes: int | None = None
    worst_over_bytes: int | None = None
    unplanned_error: float | None = None
    took_s: float = 0.0
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Found(Exception):
    def __init__(self, outcome: str, why: str) -> None:
        super().__init__(outcome, why)
        self.outcome, self.why = outcome, why


def judge(case: Case) -> Verdict:
    """Plan a case at its least budget and half-way up, run it and say what came of it."""
    began = time.perf_counter()
    figures: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's samples call deprecated things, too
            _judge(case, figures)
        outcome, why = "green", ""
    except NoCase as error:
        outcome, why = "no case", _first_line(error)
    except _Found as found:
        outcome, why = found.outcome, found.why
    took_s = round(time.perf_counter() - began, 2)
    return Verdict(case=str(case), outcome=outcome, why=why, took_s=took_s, **figures)


def _judge(case: Case, figures: dict[str, Any]) -> None:
    build = subject_of(case)
    x = torch.ones(())
    expected = _eager(build, x)
    model = _seeded(build)
    least = _planned(model, x, 1, figures)
    _weigh(least, model, x, figures, unplanned=True)
    _run(least, _seeded(build), x, expected)  # captured again for a model of its own
    half = (least.budget_bytes + max(least.budget_bytes, least.baseline_peak_bytes)) // 2
    plan = _planned(model, x, half, figures)
    _weigh(plan, model, x, figures, unplanned=False)
    _run(plan, model, x, expected)


def _eager(build: Callable[[], nn.Module], x: Tensor) -> dict[str, Any]:
    try:
        expected = _train(_seeded(build), x)
        again = _train(_seeded(build), x)
    except NoCase:
        raise
    except Exception as error:
        raise NoCase(f"eager raises {type(error).__name__}: {_first_line(error)}") from error
    if _difference(expected, again) is not None:
        raise NoCase("eager does not repeat itself")
    return expected


def _planned(model: nn.Module, x: Tensor, budget_bytes: int, figures: dict[str, Any]) -> Plan:
    try:
        try:
            plan = optimize(
                model, x, budget_bytes=budget_bytes, loss_fn=loss_of, time_limit_s=0.2, gap=0.01
            )
        except InfeasibleBudgetError as error:
            plan = optimize(
                model,
                x,
                budget_bytes=error.min_budget_bytes,
                loss_fn=loss_of,
                time_limit_s=0.2,
                gap=0.01,
            )
    except CaptureError as error:
        figures["detail"] = str(error)
        raise _Found("refused", class_of_refusal(str(error))) from error
    except Exception as error:
        why = f"while planning: {type(error).__name__}: {_first_line(error)}"
        raise _Found("crashed", why) from error
    figures.setdefault("least_bytes", plan.budget_bytes)
    figures.setdefault("unplanned_bytes", plan.baseline_peak_bytes)
    return plan


def _run(plan: Plan, model: nn.Module, x: Tensor, expected: dict[str, Any]) -> None:
    try:
        torch.manual_seed(_SEED)
        found = _train(plan.apply(model), x)
    except Exception as error:
        raise _Found("raises later", f"{type(error).__name__}: {_first_line(error)}") from error
    different = _difference(expected, found)
    if different is not None:
        raise _Found("other strides" if "strides" in different else "wrong bits", different)


def _weigh(
    plan: Plan, model: nn.Module, x: Tensor, figures: dict[str, Any], *, unplanned: bool
) -> None:
    try:
        seen = plan.validate(model, x, loss_fn=loss_of, repeats=0, bits=False, unplanned=unplanned)
    except Exception as error:
        raise _Found(
            "raises later", f"validate: {type(error).__name__}: {_first_line(error)}"
        ) from error
    measured, predicted = seen.peak.measured, seen.peak.predicted
    over = measured - plan.budget_bytes
    figures["worst_over_bytes"] = max(over, figures.get("worst_over_bytes") or over)
    if seen.unplanned_peak is not None:
        whole = seen.unplanned_peak
        figures["unplanned_error"] = whole.measured / whole.predicted - 1
    if over > 0:
        raise _Found("above the budget", f"{over} bytes, {over / plan.budget_bytes:+.1%}")
    if abs(measured / predicted - 1) > TOLERANCE and abs(measured - predicted) > SMALLEST_BYTES:
        raise _Found("prediction off", f"planned peak {measured / predicted - 1:+.1%}")


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(_SEED)
    return build().train()


def _train(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Everything that two steps leave, and the strides of their results."""
    seen: dict[str, Any] = {}
    for i in range(_STEPS):
        torch.manual_seed(_SEED + 1 + i)
        model.zero_grad(set_to_none=True)
        (output, strides), loss = train_step(model, x, loss_of)
        assert loss is not None
        seen[f"strides of output {i}"] = strides
        seen[f"output {i}"], seen[f"loss {i}"] = output.detach().clone(), loss.detach().clone()
        for name, p in model.named_parameters():
            seen[f"gradient {i} of {name}"] = None if p.grad is None else p.grad.detach().clone()
            seen[f"strides {i} of {name}"] = None if p.grad is None else strides_of(p.grad)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad.nan_to_num(0.0, 0.0, 0.0), alpha=1e-3)
        for name, b in model.named_buffers():
            seen[f"buffer {name} after {i}"] = b.detach().clone()
        seen[f"generator after {i}"] = torch.get_rng_state()
    return seen


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    for name, a in expected.items():
        b = found.get(name)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name}: shape or dtype"
            bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
            if not torch.equal(*bits):
                return name
        elif a is not b and a != b:
            return f"{name}: {a} in eager, {b} planned"
    return None


def class_of_refusal(message: str) -> str:
    """The class of a refusal, else its own first words."""
    for name, pattern in _CLASSES:
        if re.search(pattern, message):
            return name
    reasons = [line for line in message.splitlines() if line.startswith("  ")]
    reason = (reasons or [message])[0].strip()
    return re.sub(r"'[^']*'|\d+", "…", reason.split(" (at ")[0])[:110]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]
