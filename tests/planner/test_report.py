"""What print(plan) says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from graph_capture.units import format_bytes, format_us
from planner import Plan, PlanError, optimize
from solvers.scopes import BoundScope
from tests.planner.small import make, plan_for, sample, square


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan that recomputes, with an optimizer."""
    return plan_for(make(), sample(), loss_fn=square, optimizer="adamw")


def test_the_report_has_every_figure(plan):
    """Budget, both peaks, both times, overhead, bound, gap, solver and fingerprint."""
    text = str(plan)
    for figure in (
        f"Plan for {format_bytes(plan.budget_bytes)} on cpu",
        f"{format_bytes(plan.predicted_peak_bytes)} predicted",
        f"{format_bytes(plan.baseline_peak_bytes)} when nothing is recomputed",
        f"{format_us(plan.predicted_step_us)} predicted",
        f"{plan.overhead:.2%}",
        f"gap {plan.gap:.2%}",
        str(plan.status),
        plan.solver,
        plan.bound_scope.words,
        plan.fingerprint[:12],
        plan.memory.operator,
        "AdamW state and step",
        "backward of loss_fn",
    ):
        assert figure in text, figure


@pytest.mark.parametrize("scope", [s for s in BoundScope if s is not BoundScope.OWN_ORDER_STAGED])
def test_the_report_says_what_the_bound_speaks_of(plan, scope):
    """One line has the bound, the next one the schedules that it holds for."""
    lines = str(replace(plan, bound_scope=scope)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  proof"))
    assert lines[at].endswith(f"at least {format_us(plan.lower_bound_us)} in")
    assert lines[at + 1].strip() == scope.words
    assert len(lines[at + 1]) <= 130


def test_the_report_counts_recomputations(plan):
    """Runs and operators are those of the schedule."""
    repeats = plan.schedule.recomputed()
    assert f"recompute {sum(repeats.values())} runs of {len(repeats)} operators" in str(plan)


def test_the_report_of_a_plan_that_keeps_all():
    """It says that nothing is recomputed and that no optimizer counts."""
    text = str(optimize(make(), sample(), budget_gb=1, loss_fn=square))
    assert "recompute nothing" in text
    assert "no optimizer" in text


def test_the_report_fits_a_terminal(plan):
    """At most some thirty lines, none of them endless."""
    lines = str(plan).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 160


def test_detached_outputs_are_named():
    """Where only output.loss is differentiated, report and use name what is not."""
    from transformers.modeling_outputs import CausalLMOutput

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def forward(self, x):
            y = self.net(x)
            return CausalLMOutput(loss=square(y), logits=y)

    plan = optimize(WithLoss().train(), sample(), budget_gb=1)
    assert plan.detached == ("logits",)
    assert "detached: logits" in str(plan)
    output = plan.apply(WithLoss().train())(sample())
    assert output.loss.requires_grad
    assert output.logits.requires_grad
    with pytest.raises(PlanError, match="logits"):
        output.logits.sum().backward()


def test_the_short_form_is_one_line(plan):
    """repr has status, budget, peak and overhead."""
    assert "\n" not in repr(plan)
    assert format_bytes(plan.budget_bytes) in repr(plan)


class _Caching(nn.Module):
    """Returns what nobody differentiates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        keys = self.first(x)
        return {"logits": self.last(torch.tanh(keys)), "cache": (keys * 2, keys + 1)}


def test_the_report_says_what_unused_outputs_hold():
    """Outputs that are not differentiated and live at the peak are named with their bytes."""
    plan = optimize(
        _Caching().train(),
        torch.randn(64, 32),
        budget_gb=1,
        loss_fn=lambda output: output["logits"].square().mean(),
    )
    held = format_bytes(2 * 64 * 32 * 4)
    one = format_bytes(64 * 32 * 4)
    assert f"held      {held} of the peak by outputs" in str(plan)
    assert f"cache.0 {one}, cache.1 {one}" in str(plan)
