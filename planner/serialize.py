"""Plans as JSON: written whole or not at all, and believed only after checking.

The format is ``plan.schema.json`` beside this file (JSON Schema 2020-12). What
a file says about its own quality is not taken over: peak, time, overhead and
gap are computed again from its graph and schedule, and a file whose schedule
does not compute its graph within its budget is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from graph_capture.call_spec import TensorSpec, from_json, to_json
from graph_capture.cost_graph import GRAPH_FORMAT, CostGraph
from graph_capture.optimizer_step import OptimizerStep
from graph_capture.trace import LossRegion, LossSpec
from solvers.replay import InvalidScheduleError
from solvers.result import SolveStatus
from solvers.schedule import Schedule

from .call_guard import CallGuard
from .errors import PlanError
from .plan import Plan

SCHEMA_VERSION = 1
MAX_FILE_BYTES = 2**30


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a plan file."""
    return json.loads(files("planner").joinpath("plan.schema.json").read_text("utf-8"))


def save_plan(plan: Plan, path: Path) -> None:
    """Write ``plan`` beside ``path`` and move it there when it is complete."""
    text = json.dumps(plan_to_dict(plan), indent=1, allow_nan=False)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def load_plan(path: Path) -> Plan:
    """Read a plan file; see :meth:`planner.Plan.load`."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise PlanError(f"{path} has {size} bytes; a plan has at most {MAX_FILE_BYTES}")
    try:
        data = json.loads(path.read_text("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not a plan: it is no JSON ({error})") from error
    try:
        return plan_from_dict(data)
    except PlanError as error:
        raise PlanError(f"{path} is not a usable plan: {error}") from error


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """A plan as plain lists, strings and numbers that fit the schema."""
    graph = plan.graph.to_dict()
    repeats = plan.schedule.recomputed()
    for v, operator in enumerate(graph["operators"]):
        operator["runs"] = 1 + repeats.get(v, 0)
    decisions = _decisions(plan)
    for k, storage in enumerate(graph["storages"]):
        storage["decision"] = decisions[k]
    memory = plan.memory
    region = plan.loss.region
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": plan.fingerprint,
        "torch_version": plan.torch_version,
        "device_type": plan.device_type,
        "budget_bytes": plan.budget_bytes,
        "solver": {
            "name": plan.solver,
            "status": str(plan.status),
            "lower_bound_us": plan.lower_bound_us,
            "bound_scope": plan.bound_scope,
            "seed": plan.seed,
            "solve_s": plan.solve_s,
            "log": list(plan.log),
        },
        "prediction": {
            "peak_bytes": plan.predicted_peak_bytes,
            "step_us": plan.predicted_step_us,
            "baseline_peak_bytes": plan.baseline_peak_bytes,
            "baseline_step_us": plan.baseline_step_us,
            "overhead": plan.overhead,
            "gap": plan.gap,
            "peak_by_category": dict(memory.by_category),
            "peak_operator": memory.operator,
        },
        "rules": {
            "never_recompute": list(plan.never_recompute),
            "always_recompute": list(plan.always_recompute),
        },
        "call": {
            "arguments": to_json(plan.guard.arguments),
            "autocast": plan.guard.autocast,
            "evaluating": list(plan.guard.evaluating),
            "state": {name: to_json(spec)["tensor"] for name, spec in plan.guard.state.items()},
        },
        "optimizer": None
        if plan.optimizer is None
        else {
            "name": plan.optimizer.name,
            "state_bytes": plan.optimizer.state_bytes,
            "workspace_bytes": plan.optimizer.workspace_bytes,
        },
        "loss": {
            "label": region.label,
            "held_bytes": region.held_bytes,
            "constant_bytes": region.constant_bytes,
            "workspace_bytes": region.workspace_bytes,
            "differentiated": list(plan.loss.differentiated),
            "tangents": [to_json(spec)["tensor"] for spec in plan.loss.tangents],
        },
        "detached": list(plan.detached),
        "operators": graph["operators"],
        "storages": graph["storages"],
        "schedule": list(plan.schedule.order),
    }


def plan_from_dict(data: Any) -> Plan:
    """The inverse of :func:`plan_to_dict`.

    Raises
    ------
    PlanError
        Names the first thing that is wrong.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise PlanError(
            f"schema_version is {version!r}, this version reads {SCHEMA_VERSION}; "
            "make the plan again"
        )
    problem = best_match(Draft202012Validator(schema()).iter_errors(data))
    if problem is not None:
        raise PlanError(f"at {problem.json_path}: {problem.message[:200]}")
    try:
        plan = _build(data)
    except InvalidScheduleError as error:
        raise PlanError(f"the schedule does not compute the step: {error}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(str(error)) from error
    if plan.fingerprint != data["fingerprint"]:
        raise PlanError("the graph does not have the fingerprint that the file names: damaged")
    if plan.predicted_peak_bytes > plan.budget_bytes:
        raise PlanError(
            f"the schedule peaks at {plan.predicted_peak_bytes} bytes, "
            f"above the budget of {plan.budget_bytes}"
        )
    return plan


def _build(data: Mapping[str, Any]) -> Plan:
    graph = CostGraph.from_dict(
        {
            "format": GRAPH_FORMAT,
            "operators": [_without(op, "runs") for op in data["operators"]],
            "storages": [_without(s, "decision") for s in data["storages"]],
        }
    )
    solver, prediction, call, loss = (data[k] for k in ("solver", "prediction", "call", "loss"))
    return Plan(
        graph=graph,
        schedule=Schedule(tuple(data["schedule"])),
        guard=CallGuard(
            arguments=from_json(call["arguments"]),
            autocast=call["autocast"],
            evaluating=tuple(call["evaluating"]),
            state={name: _tensor(spec) for name, spec in call["state"].items()},
        ),
        budget_bytes=data["budget_bytes"],
        baseline_peak_bytes=prediction["baseline_peak_bytes"],
        baseline_step_us=prediction["baseline_step_us"],
        lower_bound_us=solver["lower_bound_us"],
        bound_scope=solver["bound_scope"],
        status=SolveStatus(solver["status"]),
        solver=solver["name"],
        solve_s=solver["solve_s"],
        seed=solver["seed"],
        log=tuple(solver["log"]),
        optimizer=None if data["optimizer"] is None else OptimizerStep(**data["optimizer"]),
        loss=LossSpec(
            region=LossRegion(
                label=loss["label"],
                held_bytes=loss["held_bytes"],
                constant_bytes=loss["constant_bytes"],
                workspace_bytes=loss["workspace_bytes"],
            ),
            differentiated=tuple(loss["differentiated"]),
            tangents=tuple(_tensor(spec) for spec in loss["tangents"]),
        ),
        never_recompute=tuple(data["rules"]["never_recompute"]),
        always_recompute=tuple(data["rules"]["always_recompute"]),
        detached=tuple(data["detached"]),
        device_type=data["device_type"],
        torch_version=data["torch_version"],
    )


def _tensor(spec: Mapping[str, Any]) -> TensorSpec:
    return from_json({"tensor": spec})


def _without(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k != key}


def _decisions(plan: Plan) -> list[str]:
    """For each storage: resident, saved (alive from forward into backward), recomputed, or
    transient (not needed again)."""
    phases = [plan.graph.operators[v].phase for v in plan.schedule.order]
    turn = phases.index("loss")
    repeats = plan.schedule.recomputed()
    decisions = [
        "resident" if s.producer is None else "recomputed" if s.producer in repeats else "transient"
        for s in plan.graph.storages
    ]
    for k, born, last in plan._replay.live:
        if born < turn < last:
            decisions[k] = "saved"
    return decisions


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that a plan may hold")


__all__ = ["SCHEMA_VERSION", "load_plan", "plan_from_dict", "plan_to_dict", "save_plan", "schema"]
