"""Files of earlier versions, kept beside this test as they were written then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_training
from planner import Comparison, Plan
from planner.comparison_record import RowOutcome
from planner.errors import PlanMismatchError
from planner.saving.serialize import plan_from_dict, plan_to_dict, schema
from solvers.any_order.permutation import first_runs
from solvers.scopes import BoundScope
from tests.planner.small import make, sample, square

FIXTURES = Path(__file__).parent / "fixtures"
IN_EAGERS_ORDER = FIXTURES / "net_in_eagers_order.json"
IN_ITS_OWN_ORDER = FIXTURES / "fan_in_its_own_order.json"

WORDS = {
    BoundScope.BASE_ORDER: "every schedule whose first runs keep the base order",
    BoundScope.STAGED: "schedules that run each operator at most once, in base order, between "
    "first runs",
    BoundScope.ANY_ORDER: "every schedule whose first runs stay on eager's side of the loss, in "
    "any order",
    BoundScope.OWN_ORDER: "every schedule whose first runs keep the base order, which here is the "
    "order of this plan and not eager's",
    BoundScope.OWN_ORDER_STAGED: "schedules that run each operator at most once, in base order, "
    "between first runs, which here is the order of this plan and not eager's",
}
"""What earlier files have for ``bound_scope``."""


class Fan(nn.Module):
    """Branches that are all made before the first is used: another order needs less memory."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Linear(width, width) if i % 2 else nn.Tanh() for i in range(6))
        )
        self.branches = nn.ModuleList(nn.Linear(width, 8 * width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x)
        wide = [branch(hidden) for branch in self.branches]
        return sum(y[:, ::2] * y[:, 1::2] for y in wide)


WRITTEN_WITH = "2.13.0"  # the torch of the files


def _written(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _bits_equal(plan: Plan, kind: type[nn.Module] | None, rows: int, width: int) -> None:
    """With the torch of the file; with another one, the plan is refused by name."""

    def build() -> nn.Module:
        return make() if kind is None else make(kind)

    if torch.__version__.partition("+")[0] != WRITTEN_WITH:
        with pytest.raises(PlanMismatchError, match=rf"torch {WRITTEN_WITH}.*make the plan again"):
            plan.apply(build())
        return
    assert_same_training(
        build, plan.apply, lambda seed: sample(seed, rows, width), loss_fn=square, steps=2
    )


def test_a_plan_in_eagers_order_loads_and_applies() -> None:
    """It trains bit by bit like eager and prints the sentence of its file."""
    plan = Plan.load(IN_EAGERS_ORDER)
    assert plan.bound_scope is BoundScope.BASE_ORDER
    assert _written(IN_EAGERS_ORDER)["solver"]["bound_scope"] in str(plan)
    assert plan.schedule.recomputed()
    _bits_equal(plan, None, 256, 32)


def test_a_plan_in_its_own_order_loads_and_applies() -> None:
    """Its bound speaks of that order."""
    plan = Plan.load(IN_ITS_OWN_ORDER)
    assert plan.bound_scope is BoundScope.OWN_ORDER
    assert _written(IN_ITS_OWN_ORDER)["solver"]["bound_scope"] in str(plan)
    assert list(first_runs(plan.schedule)) != sorted(first_runs(plan.schedule))
    _bits_equal(plan, Fan, 64, 16)


@pytest.mark.parametrize("scope", WORDS)
def test_words_become_codes(scope: BoundScope) -> None:
    """Each sentence that files ever had, and each code; a plan is written with the code."""
    data = _written(IN_EAGERS_ORDER)
    for said in (WORDS[scope], str(scope)):
        data["solver"]["bound_scope"] = said
        plan = plan_from_dict(data)
        assert plan.bound_scope is scope
        assert plan.bound_scope.words == WORDS[scope]
        assert plan_to_dict(plan)["solver"]["bound_scope"] == str(scope)
    assert data["solver"]["bound_scope"] == str(scope)


def test_the_schema_has_every_code() -> None:
    """A plan file with any of them is valid."""
    found = schema()["properties"]["solver"]["properties"]["bound_scope"]["enum"]
    assert found == [str(scope) for scope in BoundScope]


def test_the_older_plan_was_written_by_the_older_version() -> None:
    """The fixtures have sentences, or these tests would show nothing."""
    assert _written(IN_EAGERS_ORDER)["solver"]["bound_scope"] == WORDS[BoundScope.BASE_ORDER]
    assert _written(IN_ITS_OWN_ORDER)["solver"]["bound_scope"] == WORDS[BoundScope.OWN_ORDER]


SIGNS = {
    ("none", "1kB"): RowOutcome.OVER_BUDGET,
    ("auto", "1kB"): RowOutcome.PROVEN_INFEASIBLE,
    ("rotor", "50%"): RowOutcome.NOTHING_FOUND,
    ("uniform_bytes", "50%"): RowOutcome.NOTHING_FOUND,
    ("auto", "50%"): RowOutcome.FOUND,
    ("megatron_selective", "90%"): RowOutcome.NOT_APPLICABLE,
    ("broken", "90%"): RowOutcome.FAILED,
    ("gradient_checkpointing_enable", ""): RowOutcome.FAILED,
    ("checkpoint_per_block", ""): RowOutcome.FOUND,
}


def test_an_older_comparison_loads() -> None:
    """Its rows get the outcome and the flag that their texts stood for."""
    path = FIXTURES / "net_comparison.json"
    assert "outcome" not in _written(path)["rows"][0]
    found = Comparison.load(path)
    assert {key: found.row(*key).outcome for key in SIGNS} == SIGNS
    assert {row.strategy for row in found.rows if row.off_order} == {"swapped"}
    assert {bound.scope for bound in found.bounds} == {BoundScope.BASE_ORDER}
    assert "swapped: not in eager's order: the bound does not speak of it" in str(found)


def test_an_older_comparison_is_written_as_one_of_today(tmp_path: Path) -> None:
    """With codes, and the same after reading."""
    found = Comparison.load(FIXTURES / "net_comparison.json")
    found.save(tmp_path / "again.json")
    assert _written(tmp_path / "again.json")["rows"][0]["outcome"] == "over_budget"
    assert Comparison.load(tmp_path / "again.json") == found
