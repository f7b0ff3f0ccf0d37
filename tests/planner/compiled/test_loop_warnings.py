"""A loop that holds more than the plans of its compiled graphs count is told once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from planner import PlanWarning
from planner.measuring.measure import measure
from tests.planner.compiled.models import compiled, model_and_sample, step


def _said(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, PlanWarning)]


def test_gradients_of_an_earlier_step_are_said_once() -> None:
    """A second micro-batch has them, which the plan does not count; the step takes as much more."""
    model, x = model_and_sample()
    call, plans = compiled(model, budget_bytes=480_000)
    gradient_bytes = sum(4 * p.numel() for p in model.parameters())
    step(model, call, x)  # warnings are errors
    (said,) = _said(lambda: [call(x).backward() for _ in range(2)])
    assert "have gradients of 67.3 kB when a compiled step begins" in said
    measured = measure(call, x, repeats=0, grads="accumulated").peak_bytes
    assert plans[0].usable_bytes < measured <= plans[0].predicted_peak_bytes + gradient_bytes


@pytest.mark.parametrize("options", [{"grads": "accumulated"}, {"budget_bytes": 10**6}])
def test_gradients_that_are_counted_or_fit_are_not_said(options: dict[str, Any]) -> None:
    """Nor those that are gone when a step begins."""
    model, x = model_and_sample()
    call, _ = compiled(model, **{"budget_bytes": 520_000, **options})
    for _ in range(3):
        call(x).backward()  # warnings are errors


def test_a_retained_graph_is_said_once() -> None:
    """What was saved stays, which takes the step above its budget."""
    model, x = model_and_sample()
    call, _ = compiled(model, budget_bytes=480_000)

    def twice() -> None:
        loss = call(x)
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
        model.zero_grad()

    (said,) = _said(lambda: [twice() for _ in range(2)])
    assert said.startswith("backward(retain_graph=True) through a compiled graph")


def test_a_retained_graph_that_fits_is_not_said() -> None:
    """The budget then covers what stays."""
    model, x = model_and_sample()
    call, _ = compiled(model, budget_bytes=10**6)
    call(x).backward(retain_graph=True)  # warnings are errors
