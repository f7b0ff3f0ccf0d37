"""The child process that runs OR-tools: a program comes in, JSON lines go out.

Run as a file, never imported by the package: OR-tools and highspy both bring
HiGHS, their symbols clash, and ``solvers`` imports highspy. So this file
imports nothing of the package, only numpy and OR-tools.

In: on stdin an ``npz`` file, whose entry ``request`` is JSON. Out, one a line:

    {"event": "solution", "objective": …, "values": […]}    a better one
    {"event": "bound", "bound": …}                          a better one
    {"event": "done", "status": …, "objective": …, "bound": …, "values": […]}
    {"event": "error", "kind": "missing" | "backend" | "refused", "message": …}

``status`` is ``optimal``, ``feasible``, ``infeasible``, ``unknown`` or
``failed``. The process ends when its parent is gone or its time is long over.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Emit = Callable[[dict[str, Any]], None]

STATUS_OF_REASON = {
    "OPTIMAL": "optimal",
    "FEASIBLE": "feasible",
    "INFEASIBLE": "infeasible",
    "INFEASIBLE_OR_UNBOUNDED": "infeasible",  # what costs at least nothing is not unbounded
    "NO_SOLUTION_FOUND": "unknown",
}


def main() -> None:
    emit = _take_stdout()
    with np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    request = json.loads(str(arrays.pop("request")))
    threading.Thread(target=_watch, args=(request,), daemon=True).start()
    solve = {"mip": solve_mip, "cp": solve_cp}[request["kind"]]
    try:
        solve(request, arrays, emit)
    except ImportError as error:
        emit({"event": "error", "kind": "missing", "message": str(error)})
    except _BackendError as error:
        emit({"event": "error", "kind": "backend", "message": str(error)})
    except MemoryError:
        raise  # the parent sees how this process ended
    except Exception as error:  # noqa: BLE001  whatever it is, the parent raises it
        emit({"event": "error", "kind": "refused", "message": _whole_message(error)})


class _BackendError(RuntimeError):
    """The solver behind MathOpt is not there."""


def _take_stdout() -> Emit:
    """Keep stdout for events; what solvers print goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(event: dict[str, Any]) -> None:
        with lock:
            out.write(json.dumps(event) + "\n")
            out.flush()

    return emit


def _watch(request: dict[str, Any]) -> None:
    """End this process when nobody waits for it any more."""
    while os.getppid() == request["parent"] and time.time() < request["kill_at"]:
        time.sleep(0.2)
    os._exit(1)


def _whole_message(error: BaseException) -> str:
    """Its message, and that of what it hides (OR-tools 9.15 loses a solver's own words)."""
    parts = [f"{type(error).__name__}: {error}"]
    if error.__context__ is not None:
        parts.insert(0, str(error.__context__))
    return "; ".join(parts)


def _left_s(request: dict[str, Any]) -> float:
    return max(0.01, request["stop_at"] - time.time())


def _number(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and np.isfinite(value) else None


def solve_mip(request: dict[str, Any], arrays: dict[str, Any], emit: Emit) -> None:
    """A ``MixedIntegerProgram``, by the MathOpt solver that ``request["backend"]`` names."""
    import datetime

    from ortools.math_opt import model_pb2
    from ortools.math_opt.python import mathopt
    from ortools.math_opt.solvers import highs_pb2

    num = len(arrays["cost"])
    proto = model_pb2.ModelProto()
    proto.variables.ids.extend(range(num))
    proto.variables.lower_bounds.extend([0.0] * num)
    proto.variables.upper_bounds.extend(arrays["upper"].tolist())
    proto.variables.integers.extend(arrays["integer"].tolist())
    paid = np.flatnonzero(arrays["cost"])
    proto.objective.linear_coefficients.ids.extend(paid.tolist())
    proto.objective.linear_coefficients.values.extend(arrays["cost"][paid].tolist())
    proto.linear_constraints.ids.extend(range(len(arrays["row_lower"])))
    proto.linear_constraints.lower_bounds.extend(arrays["row_lower"].tolist())
    proto.linear_constraints.upper_bounds.extend(arrays["row_upper"].tolist())
    by_row = np.lexsort((arrays["cols"], arrays["rows"]))
    proto.linear_constraint_matrix.row_ids.extend(arrays["rows"][by_row].tolist())
    proto.linear_constraint_matrix.column_ids.extend(arrays["cols"][by_row].tolist())
    proto.linear_constraint_matrix.coefficients.extend(arrays["values"][by_row].tolist())
    model = mathopt.Model.from_model_proto(proto)
    columns = [model.get_variable(i) for i in range(num)]

    backend = request["backend"]
    params = mathopt.SolveParameters(random_seed=request["seed"])
    if arrays["integer"].any():
        params.relative_gap_tolerance = 0.0
        params.absolute_gap_tolerance = request["absolute_gap"]
    if backend == "highs":
        # MathOpt refuses `threads` for HiGHS, and its scheduler is global to the process.
        params.highs = highs_pb2.HighsOptionsProto(int_options={"threads": request["workers"]})
    elif backend in ("cp_sat", "gurobi"):
        params.threads = request["workers"]
    if backend == "cp_sat":
        params.cp_sat.mip_max_bound = 1e15  # bytes go far beyond its default of 1e7
        params.cp_sat.mip_check_precision = 1e-6
    model_params = mathopt.ModelSolveParameters()
    if len(arrays["hint_cols"]):
        pairs = zip(arrays["hint_cols"].tolist(), arrays["hint_values"].tolist(), strict=True)
        hint = mathopt.SolutionHint(variable_values={columns[i]: x for i, x in pairs})
        model_params.solution_hints.append(hint)

    def report(data: Any) -> Any:
        if data.solution is not None:
            values = [data.solution[column] for column in columns]
            emit({"event": "solution", "objective": None, "values": values})
        return mathopt.CallbackResult()

    callback: dict[str, Any] = {}
    if backend == "highs":  # its solutions on the way are not passed on, its log is
        callback = {"msg_cb": lambda lines: _tell_bounds(lines, emit)}
    else:
        events = mathopt.CallbackRegistration(events={mathopt.Event.MIP_SOLUTION})
        callback = {"callback_reg": events, "cb": report}
    params.time_limit = datetime.timedelta(seconds=_left_s(request))
    solver = {"scip": "GSCIP"}.get(backend, backend.upper())
    try:
        result = mathopt.solve(
            model,
            mathopt.SolverType[solver],
            params=params,
            model_params=model_params,
            **callback,
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if backend == "gurobi":  # without its library the message is "bad_function_call"
            raise _BackendError(f"gurobi: {error}") from None
        raise
    termination = result.termination
    bounds = termination.objective_bounds
    status = STATUS_OF_REASON.get(termination.reason.name, "failed")
    values = None
    if status in ("optimal", "feasible") and result.has_primal_feasible_solution():
        values = result.variable_values(columns)
    emit(
        {
            "event": "done",
            "status": status,
            "objective": _number(bounds.primal_bound),
            "bound": _number(bounds.dual_bound)
            if status in ("optimal", "feasible", "unknown")
            else None,
            "values": values,
            "message": f"{termination.reason.name.lower()} {termination.detail}".strip(),
        }
    )


HIGHS_TABLE = re.compile(r"^ .{0,2}\s+\d+\s+\d+\s+\d+\s+[\d.]+%\s+(-?[\d.e+]+)\s+\S+\s+\S+\s+\d")
"""A line of HiGHS' table of nodes: source, three counts, per cent, dual bound, best solution."""


def _tell_bounds(lines: list[str], emit: Emit) -> None:
    """Read dual bounds, of ten digits, off HiGHS' log: all that is left if it must be killed."""
    for line in lines:
        found = HIGHS_TABLE.match(line)
        if found:
            emit({"event": "bound", "bound": float(found[1])})


def solve_cp(request: dict[str, Any], arrays: dict[str, Any], emit: Emit) -> None:
    """A ``ConstraintProgram``, by CP-SAT."""
    from ortools.sat.python import cp_model

    program = request["program"]
    model = cp_model.CpModel()
    columns = [
        model.new_bool_var(f"x{i}")
        if values == [0, 1]
        else model.new_int_var_from_domain(cp_model.Domain.from_flat_intervals(values), f"x{i}")
        for i, values in enumerate(program["domains"])
    ]

    def affine(pair: list[int]) -> Any:
        return pair[1] if pair[0] < 0 else columns[pair[0]] + pair[1]

    for cols, factors, lower, only_if in program["linear"]:
        total = cp_model.LinearExpr.weighted_sum([columns[i] for i in cols], factors)
        constraint = model.add(total >= lower)
        if only_if:
            constraint.only_enforce_if([columns[i] for i in only_if])
    for literals, only_if in program["clauses"]:
        constraint = model.add_bool_or([columns[i] for i in literals])
        if only_if:
            constraint.only_enforce_if([columns[i] for i in only_if])
    intervals = [
        model.new_interval_var(affine(start), affine(size), affine(end), f"i{i}")
        if present < 0
        else model.new_optional_interval_var(
            affine(start), affine(size), affine(end), columns[present], f"i{i}"
        )
        for i, (start, size, end, present) in enumerate(program["intervals"])
    ]
    for chosen, demands, capacity in program["cumulatives"]:
        model.add_cumulative([intervals[i] for i in chosen], demands, affine(capacity))
    goal = program["objective"]
    model.minimize(
        cp_model.LinearExpr.weighted_sum([columns[i] for i, _ in goal], [c for _, c in goal])
    )
    for i, value in program["hint"]:
        model.add_hint(columns[i], value)

    class Report(cp_model.CpSolverSolutionCallback):
        def on_solution_callback(self) -> None:
            values = [self.value(column) for column in columns]
            emit({"event": "solution", "objective": self.objective_value, "values": values})

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = request["workers"]
    solver.parameters.random_seed = request["seed"]
    solver.parameters.max_time_in_seconds = _left_s(request)
    solver.parameters.catch_sigint_signal = False
    solver.best_bound_callback = lambda bound: emit({"event": "bound", "bound": bound})
    status = solver.solve(model, Report())
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    if status == cp_model.MODEL_INVALID:
        raise ValueError(f"CP-SAT refuses the model: {model.validate()}")
    name = {
        cp_model.OPTIMAL: "optimal",
        cp_model.FEASIBLE: "feasible",
        cp_model.INFEASIBLE: "infeasible",
        cp_model.UNKNOWN: "unknown",
    }[status]
    emit(
        {
            "event": "done",
            "status": name,
            "objective": solver.objective_value if found else None,
            "bound": None if name == "infeasible" else _number(solver.best_objective_bound),
            "values": [solver.value(column) for column in columns] if found else None,
            "message": solver.solution_info() if found else "",
        }
    )


if __name__ == "__main__":
    main()
