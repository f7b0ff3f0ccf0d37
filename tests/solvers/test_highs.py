from __future__ import annotations

import math
import subprocess
import sys

import highspy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array

from solvers.highs import BOUND_TOLERANCE, OBJECTIVE_SCALE, build_lp, quiet_highs, rounded_bound


def knapsack(*, integer: bool) -> highspy.HighsLp:
    """Minimize 3x + 2y where 2x + y ≥ 2 and x + y ≤ 3/2, both at most 1."""
    return build_lp(
        cost=np.array([3.0, 2.0]),
        upper=np.ones(2),
        matrix=coo_array(([2.0, 1.0, 1.0, 1.0], ([0, 0, 1, 1], [0, 1, 0, 1]))),
        row_lower=np.array([2.0, -highspy.kHighsInf]),
        row_upper=np.array([highspy.kHighsInf, 1.5]),
        integer=np.array([integer, integer]),
    )


@pytest.mark.parametrize(("integer", "optimum"), [(False, 3.0), (True, 3.0)])
def test_solves_what_was_built(integer: bool, optimum: float) -> None:
    """x = 1 alone satisfies both rows, at a cost of 3."""
    h = quiet_highs(time_limit_s=10)
    h.passModel(knapsack(integer=integer))
    h.run()
    assert h.getModelStatus() == highspy.HighsModelStatus.kOptimal
    assert h.getInfo().objective_function_value == pytest.approx(optimum)
    assert h.getSolution().col_value == pytest.approx([1.0, 0.0])


def test_whole_columns_are_whole() -> None:
    """Half of x is cheapest where 2x ≥ 1, unless x is whole."""
    costs = {}
    for integer in (False, True):
        h = quiet_highs(time_limit_s=10)
        h.passModel(
            build_lp(
                cost=np.array([4.0]),
                upper=np.ones(1),
                matrix=coo_array(([2.0], ([0], [0]))),
                row_lower=np.array([1.0]),
                row_upper=np.array([highspy.kHighsInf]),
                integer=np.array([integer]),
            )
        )
        h.run()
        costs[integer] = h.getInfo().objective_function_value
    assert costs == pytest.approx({False: 2.0, True: 4.0})


def test_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither stdout nor stderr sees HiGHS at work."""
    h = quiet_highs(time_limit_s=10)
    h.passModel(knapsack(integer=True))
    h.run()
    assert capfd.readouterr() == ("", "")


def test_takes_any_seed_and_no_time() -> None:
    """Seeds beyond 31 bits are folded, and no time left is a little time."""
    h = quiet_highs(time_limit_s=-1.0, seed=2**40 + 5)
    assert h.getOptionValue("random_seed")[1] == 5
    assert h.getOptionValue("time_limit")[1] == pytest.approx(0.01)
    assert h.getOptionValue("threads")[1] == 1


@given(
    added_ns=st.integers(0, 10**12),
    base_cost=st.integers(1, 10**12),
    below=st.floats(0, BOUND_TOLERANCE),
)
def test_a_bound_is_never_above_the_schedule_that_it_bounds(
    added_ns: int, base_cost: int, below: float
) -> None:
    """Rounding up never passes the whole number that the objective stands for."""
    value = added_ns * OBJECTIVE_SCALE / base_cost
    assert rounded_bound(value - below, base_cost) <= added_ns


def test_a_bound_is_rounded_up_to_a_whole_cost() -> None:
    """Of 1,000 ns, 12.34 units are 1.234 ns: no schedule adds less than 2 ns."""
    assert rounded_bound(12.34, 1000) == 2
    assert rounded_bound(10.0, 1000) == 1  # and not 2
    assert rounded_bound(10.0005, 1000) == 1  # within the tolerance
    assert rounded_bound(10.002, 1000) == 2


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan, -5.0, 0.0])
def test_no_bound_is_zero(value: float) -> None:
    """What HiGHS says before it has a bound is taken for none."""
    assert rounded_bound(value, 1000) == 0


def test_the_first_model_of_a_process_is_silent() -> None:
    """Since 1.16 HiGHS introduces itself once in a process, before any option is set."""
    code = "from solvers.highs import quiet_highs; quiet_highs(time_limit_s=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
