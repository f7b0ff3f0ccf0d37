"""Several calls of a model before the first of them is differentiated."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import InfeasibleBudgetError, Plan, PlanWarning, applied_plan, measure, optimize
from planner.planning import known_least
from solvers.least_memory import least_memory
from tests.planner.small import make, sample, square


class _Tower(nn.Module):
    """A residual network with dropout, whose activations outweigh its weights."""

    def __init__(self, width: int = 16, num_layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width)
            )
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def _batch(seed: int = 0, num_rows: int = 256) -> Tensor:
    return torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _plan(share: str = "70%", **words: Any) -> Plan:
    return optimize(
        _Tower(), _batch(), loss_fn=square, budget=share, time_limit_s=1, gap=0.05, **words
    )


@pytest.mark.parametrize(
    ("number", "grads"),
    [
        (2, "none"),
        pytest.param(3, "accumulated", marks=pytest.mark.slow),
    ],
)
def test_all_calls_together_stay_within_the_budget(number: int, grads: Any) -> None:
    """What waits is counted: at most the gradients of waiting outputs and one set too much."""
    words = {} if grads == "none" else {"grads": grads}
    plan = _plan(concurrent_calls=number, **words)
    assert plan.overhead > 0
    found = measure(plan.apply(_Tower()), _batch(), loss_fn=square, repeats=0)
    assert found.peak_bytes <= plan.predicted_peak_bytes <= plan.budget_bytes
    too_much = (number - 1) * 2 * _batch().nbytes
    if grads == "accumulated":
        too_much += sum(p.nbytes for p in _Tower().parameters())
    assert plan.predicted_peak_bytes - found.peak_bytes <= too_much


def test_a_contrastive_loss_has_eagers_bits_without_a_warning() -> None:
    """Over three steps with dropout, one backward pass through both calls."""
    plan, eager = _plan(concurrent_calls=2), _Tower()
    planned = plan.apply(copy.deepcopy(eager))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            found = []
            for model in (eager, planned):
                torch.manual_seed(step)
                first, second = model(_batch(2 * step)), model(_batch(2 * step + 1))
                loss = (first - second).square().mean()
                loss.backward()
                found.append([loss, *(p.grad for p in model.parameters()), torch.get_rng_state()])
                model.zero_grad()
            assert all(map(torch.equal, *found))


def test_one_call_more_than_planned_is_said() -> None:
    """With the number to plan with."""
    planned = _plan(concurrent_calls=2).apply(_Tower())
    outputs = [planned(_batch(i)) for i in range(2)]
    with pytest.warns(PlanWarning, match="counts 2. Plan with concurrent_calls=3"):
        outputs.append(planned(_batch(2)))
    sum(map(square, outputs)).backward()


def test_a_tied_weight_in_two_calls_is_said() -> None:
    """Its gradients are added in another order than eager's."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    x = torch.randn(2, 4)
    planned = optimize(Tied(), x, budget_gb=1, loss_fn=square, concurrent_calls=2).apply(Tied())
    first = planned(x)
    with pytest.warns(PlanWarning, match="uses a weight more than once"):
        second = planned(x.clone())
    (square(first) + square(second)).backward()


def test_the_least_budget_named_is_enough() -> None:
    """For all calls together."""
    with pytest.raises(InfeasibleBudgetError) as found:
        _plan("1%", concurrent_calls=2)
    plan = optimize(
        _Tower(),
        _batch(),
        loss_fn=square,
        budget_bytes=found.value.min_budget_bytes,
        concurrent_calls=2,
        time_limit_s=1,
    )
    measured = measure(plan.apply(_Tower()), _batch(), loss_fn=square, repeats=0)
    assert measured.peak_bytes <= found.value.min_budget_bytes


@pytest.mark.slow
def test_calls_of_other_shapes_leave_the_others_their_part() -> None:
    """A small and a large call together stay within the budget."""
    plan = _plan(concurrent_calls=2, shapes="sample")
    planned = plan.apply(_Tower())
    sizes = (200, 256), (256, 120), (90, 90)
    for one, other in sizes:
        (square(planned(_batch(1, one))) + square(planned(_batch(2, other)))).backward()
        planned.zero_grad()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = planned

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return square(self.tower(x)) + square(self.tower(y))

    for one, other in sizes:
        pair = _batch(1, one), _batch(2, other)
        assert measure(Both(), pair, repeats=0).peak_bytes <= plan.budget_bytes
    applied = applied_plan(planned)
    assert applied is not None
    assert applied.unplanned_steps == 0


def test_a_file_keeps_the_calls(tmp_path) -> None:
    """Saved, loaded, applied and validated."""
    plan = _plan(concurrent_calls=2)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert "of another call" in str(loaded)
    verdict = loaded.validate(_Tower(), _batch(), loss_fn=square, repeats=0)
    assert verdict.bits == "equal"
    assert verdict.peak.measured <= loaded.budget_bytes


@pytest.mark.parametrize("number", [0, True, 1.5, "2", 10**9])
def test_a_number_of_calls_that_is_none_is_refused(number: Any) -> None:
    """Before anything is captured."""
    with pytest.raises(ValueError, match="concurrent_calls is the number of calls"):
        optimize(make(), sample(), budget_gb=1, loss_fn=square, concurrent_calls=number)


def test_another_order_is_for_one_call() -> None:
    """Refused, since it would be ignored."""
    with pytest.raises(ValueError, match="reorder=True plans one call"):
        optimize(make(), sample(), budget_gb=1, loss_fn=square, concurrent_calls=2, reorder=True)


def test_searches_for_the_least_memory_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take no more than the one search of a call alone."""
    given: list[float] = []

    def searched(*args: Any, time_limit_s: float, **words: Any) -> Any:
        given.append(time_limit_s)
        return least_memory(*args, time_limit_s=0.1, **words)

    monkeypatch.setattr(known_least, "least_memory", searched)
    monkeypatch.setattr(known_least, "_found", {})
    with pytest.raises(InfeasibleBudgetError):
        optimize(_Tower(), _batch(), loss_fn=square, budget_bytes=1000, concurrent_calls=2)
    assert len(given) > 1
    assert sum(given) <= known_least.LEAST_MEMORY_LIMIT_S
