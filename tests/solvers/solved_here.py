"""A :class:`MixedIntegerProgram` solved in this process, by highspy: no child to wait for."""

from __future__ import annotations

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array

from solvers.highs import build_lp, quiet_highs
from solvers.reference.ortools_programs import MixedIntegerProgram


def solve_here(
    program: MixedIntegerProgram, fixed: dict[int, float] | None = None
) -> tuple[float, NDArray[np.float64]] | None:
    """Optimum and solution with the columns ``fixed`` as they are told; ``None``: infeasible."""
    shape = (len(program.row_lower), len(program.cost))
    lp = build_lp(
        cost=program.cost,
        upper=program.upper,
        matrix=coo_array((program.values, (program.rows, program.cols)), shape=shape),
        row_lower=program.row_lower,
        row_upper=program.row_upper,
        integer=program.integer,
    )
    h = quiet_highs(time_limit_s=20.0)
    h.setOptionValue("mip_rel_gap", 0.0)
    h.setOptionValue("mip_abs_gap", 1e-6)
    h.passModel(lp)
    for column, value in (fixed or {}).items():
        h.changeColBounds(column, value, value)
    h.run()
    if h.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None
    assert h.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return h.getInfo().objective_function_value, np.array(h.getSolution().col_value)
