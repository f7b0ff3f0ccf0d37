"""One subject of the model sweep: does a plan compute eager's bits, within its budget?"""

from __future__ import annotations

import gc
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from planner import (
    CaptureError,
    InfeasibleBudgetError,
    Plan,
    PlanError,
    measure,
    optimize,
)
from planner.base.training_step import (
    call_model,
    train_step,
)
from planner.planning import known_least

from ..testing.bitwise import assert_same_training
from .subject import NotInstalled, Subject

PART_OF_PEAK = 0.7
"""The budget as a share of eager's measured peak; if that is too low, the least budget."""
STEPS = 2
SOLVER_LIMIT_S = 1.0
LEAST_MEMORY_LIMIT_S = 1.5
"""A sweep checks whether plans hold, not whether they are the best: short searches suffice."""
TOLERANCE = 0.01
_RUN_ONCE = "run the model once before"
_REFUSALS = (CaptureError, PlanError)

OUTCOMES = (
    "green",
    "refused",
    "step refused",
    "crash",
    "other bits",
    "above budget",
    "mispredicted",
    "died",
)
"""Outcomes for a model that trains in eager, the best first."""


def run_subject(find: Callable[[], Subject]) -> dict[str, Any]:
    """Everything that a sweep finds out about one subject, for one line of JSON.

    ``outcome`` is one of :data:`OUTCOMES`, or ``"skipped"`` (not installed),
    ``"no eager"`` (it does not build or train without a plan either), or
    ``"not repeatable"`` (eager's own bits differ from run to run).
    """
    begin_s = time.perf_counter()
    record: dict[str, Any] = {"outcome": "green"}
    try:
        _run(find, record)
    except _Ended as end:
        record["outcome"] = end.outcome
        record["error"] = end.error
    record["seconds"] = round(time.perf_counter() - begin_s, 1)
    return record


class _Ended(Exception):
    def __init__(self, outcome: str, error: str) -> None:
        self.outcome = outcome
        self.error = error


def _run(find: Callable[[], Subject], record: dict[str, Any]) -> None:
    try:
        subject = find()
        _train(subject)
    except NotInstalled as error:
        raise _Ended("skipped", str(error)) from error
    except Exception as error:  # somebody else's model may raise anything
        raise _Ended("no eager", words_of(error)) from error
    record["model"] = type(_made(subject)).__name__
    try:
        _train_same(subject, lambda model: model)
    except Exception as error:
        raise _Ended("not repeatable", words_of(error)) from error

    with subject.context():
        model = _made(subject)
        try:
            eager = measure(model, _sample(subject, 1), loss_fn=subject.loss_fn, repeats=0)
        except Exception as error:
            raise _Ended("crash", "measure(): " + words_of(error)) from error
        record["eager_peak_bytes"] = eager.peak_bytes
        plan = _planned(subject, model, int(eager.peak_bytes * PART_OF_PEAK), record)
    if record.get("ran_once"):
        subject = _that_ran_once(subject)
    record |= {
        "budget_bytes": plan.budget_bytes,
        "predicted_bytes": plan.predicted_peak_bytes,
        "unplanned_bytes": plan.baseline_peak_bytes,
        "unplanned_error": round(plan.baseline_peak_bytes / eager.peak_bytes - 1, 5),
        "recomputed": sum(plan.schedule.recomputed().values()),
        "branch_free": plan.branch_free,
        "operators": plan.graph.num_operators,
    }
    try:
        # The planned model itself, which planning left as it was: nothing is captured again.
        _train_same(subject, lambda fresh: plan.apply(model))
    except AssertionError as error:
        raise _Ended("other bits", words_of(error)) from error
    except _REFUSALS as error:
        raise _Ended("step refused", words_of(error, whole=True)) from error
    except Exception as error:
        raise _Ended("crash", "planned step: " + words_of(error)) from error
    with subject.context():
        try:
            found = measure(model, _sample(subject, 1), loss_fn=subject.loss_fn, repeats=0)
        except Exception as error:
            raise _Ended("crash", "measure() of the planned: " + words_of(error)) from error
    record["planned_peak_bytes"] = found.peak_bytes
    record["planned_error"] = round(plan.predicted_peak_bytes / found.peak_bytes - 1, 5)
    if found.peak_bytes > plan.budget_bytes:
        over = found.peak_bytes / plan.budget_bytes - 1
        raise _Ended("above budget", f"the planned peak is {over:.1%} above the budget")
    if abs(record["planned_error"]) > TOLERANCE:
        raise _Ended("mispredicted", f"the planned peak is {record['planned_error']:+.1%} off")


def _planned(subject: Subject, model: nn.Module, budget_bytes: int, record: dict[str, Any]) -> Plan:
    def plan(budget_bytes: int) -> Plan:
        return optimize(
            model,
            _sample(subject, 1),
            budget_bytes=budget_bytes,
            loss_fn=subject.loss_fn,
            time_limit_s=SOLVER_LIMIT_S,
        )

    ran_once = bool(record.get("ran_once"))
    before = _facts(model)
    known_least.LEAST_MEMORY_LIMIT_S = LEAST_MEMORY_LIMIT_S
    begin_s = time.perf_counter()
    try:
        try:
            try:
                made = plan(budget_bytes)
            except InfeasibleBudgetError as error:
                record["least_budget"] = True
                made = plan(error.min_budget_bytes)
            Plan.remove(made.apply(model))  # what cannot train by it says so here
        except _REFUSALS as error:
            if ran_once or _RUN_ONCE not in str(error):
                raise
            record["ran_once"] = True
            _run_once(subject, model)
            return _planned(subject, model, budget_bytes, record)
    except _Ended:
        raise
    except _REFUSALS as error:
        raise _Ended("refused", words_of(error, whole=True)) from error
    except Exception as error:
        raise _Ended("crash", "optimize(): " + words_of(error)) from error
    record["plan_s"] = round(time.perf_counter() - begin_s, 2)
    if not _same_facts(before, _facts(model)):
        raise _Ended("other bits", "planning changed the model's tensors")
    return made


def _run_once(subject: Subject, model: nn.Module) -> None:
    """Run a model once, as the planner's error advises if the first call prepares something."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # its twins draw the same, and then have the same buffers
        call_model(model, _sample(subject, 1))


def _that_ran_once(subject: Subject) -> Subject:
    """The same subject, with models that have all run once."""

    def make() -> nn.Module:
        model = subject.make()
        _run_once(subject, model)
        return model

    return replace(subject, make=make)


def _sample(subject: Subject, seed: int) -> Any:
    """An input; also seeds Python's and NumPy's generators."""
    random.seed(seed)
    np.random.seed(seed)
    return subject.sample(seed)


def _made(subject: Subject) -> nn.Module:
    torch.manual_seed(0)
    return subject.make()


def _train(subject: Subject) -> None:
    with subject.context():
        train_step(_made(subject), _sample(subject, 1), subject.loss_fn)


def _train_same(subject: Subject, planned_apply: Callable[[nn.Module], nn.Module]) -> None:
    gc.collect()
    assert_same_training(
        subject.make,
        planned_apply,
        partial(_sample, subject),
        loss_fn=subject.loss_fn,
        steps=STEPS,
        context=subject.context,
    )


def _facts(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())
    }


def _same_facts(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return list(before) == list(after) and all(
        torch.equal(a, after[name]) or bool(a.isnan().any()) for name, a in before.items()
    )


def words_of(error: BaseException, whole: bool = False) -> str:
    """An exception's type and message on one line, with its place if nobody meant to raise it."""
    text = " ".join(str(error).split())
    words = f"{type(error).__name__}: {text[: 700 if whole else 300]}"
    if not whole:
        frames = traceback.extract_tb(error.__traceback__)
        if frames:
            last = frames[-1]
            words += f" ({Path(last.filename).name}:{last.lineno})"
    return words
