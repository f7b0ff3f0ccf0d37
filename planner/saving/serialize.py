"""Plans as JSON: written completely or not at all, and trusted only after checks.

The format is ``plan.schema.json`` (JSON Schema 2020-12). A file's own figures are not
trusted: peak, time, overhead, gap and decisions are computed again from its graph and
schedule. A file whose figures differ, or whose schedule does not compute its graph
within its budget, is refused. Only the lower bound and the baseline are taken over as
the planner wrote them.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from graph_capture.calls.call_spec import TensorSpec, from_json, to_json
from graph_capture.cost_graph import GRAPH_FORMAT, CostGraph
from graph_capture.costs.cost_model import CostRecord
from graph_capture.folding.leaving import CONSUME
from graph_capture.json_text import read_json
from graph_capture.loop.loop_holds import NOTHING_ELSE, LoopHolds
from graph_capture.loop.loss import LossRegion, LossSource, LossSpec, TangentMemory
from graph_capture.loop.optimizer_step import OptimizerStep
from graph_capture.printable import printable
from graph_capture.regular_file import read_regular
from graph_capture.values.outcomes import Outcome
from solvers.replay import InvalidScheduleError
from solvers.result import SolveStatus
from solvers.schedule import Schedule
from solvers.scopes import BoundScope, code_of

from ..base.atomic_write import write_whole
from ..base.call_guard import CallGuard
from ..base.shape_range import ShapeRange
from ..errors import PlanError
from ..plan_record import LIBRARY_WORKSPACE, PlanRecord
from .compiled_schema import CompiledSchema
from .file_checks import check_file_plan

SCHEMA_VERSION = 2
SET_VERSION = 1
_ADDED_AFTER_VERSION_2 = {"reorder", "device_name", "outcomes", "shapes"}
MAX_FILE_BYTES = 2**30


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a plan file."""
    return json.loads(files("planner").joinpath("plan.schema.json").read_text("utf-8"))


@cache
def _compiled_schema() -> CompiledSchema:
    """The same as functions, which take a thirtieth of the time."""
    return CompiledSchema(schema())


def _what_is_wrong(data: Any) -> str:
    """Say in one line where data do not match the schema, and how."""
    from jsonschema.exceptions import best_match

    problem = best_match(_validator().iter_errors(data))
    assert problem is not None
    return printable(f"at {problem.json_path[:200]}: {problem.message[:200]}")


@cache
def _validator() -> Any:
    """Says what is wrong with a plan file; imported late, because most are right."""
    from jsonschema import Draft202012Validator, validators

    # In JSON Schema, 1.0 is an integer, but it is not an index.
    integers = Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    )
    return validators.extend(Draft202012Validator, type_checker=integers)(schema())


def save_plan(plan: PlanRecord, path: Path) -> None:
    """Write ``plan`` beside ``path`` and move it there when it is complete.

    Raises
    ------
    PlanError
        When the planned call has an argument that JSON cannot hold.
    OSError
        When the file cannot be written; an earlier file stays as it was.
    """
    try:
        text = json.dumps(plan_to_dict(plan), indent=1, allow_nan=False)
        plan_from_dict(read_json(text))  # write only what can be read again
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"this plan cannot be written to a file: {error}") from error
    write_whole(path, text)


def save_plans(plans: Sequence[PlanRecord], path: Path) -> None:
    """Write several plans to one file; see :func:`save_plan`."""
    try:
        data = {"plan_set_version": SET_VERSION, "plans": [plan_to_dict(p) for p in plans]}
        text = json.dumps(data, indent=1, allow_nan=False)
        plans_from_dict(read_json(text))  # what cannot be read again is not written
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"these plans cannot be written to a file: {error}") from error
    write_whole(path, text)


def load_plan(path: Path) -> PlanRecord:
    """Read a plan file; see :meth:`planner.Plan.load`."""
    data = _read(path)
    if isinstance(data, dict) and "plan_set_version" in data:
        raise _refused(f"{path} holds a set of plans: read it with PlanSet.load")
    if isinstance(data, dict) and "block_plan_version" in data:
        raise _refused(f"{path} holds a plan in blocks: read it with BlockPlan.load")
    try:
        return plan_from_dict(data)
    except PlanError as error:
        raise _refused(f"{path} is not a usable plan: {error}") from error


def load_plans(path: Path) -> list[PlanRecord]:
    """Read a file of one plan or several; see :meth:`planner.PlanSet.load`."""
    data = _read(path)
    try:
        if isinstance(data, dict) and "plan_set_version" in data:
            return plans_from_dict(data)
        return [plan_from_dict(data)]
    except PlanError as error:
        raise _refused(f"{path} is not a usable plan: {error}") from error


def plans_from_dict(data: Any) -> list[PlanRecord]:
    """Invert what :func:`save_plans` writes.

    Raises
    ------
    PlanError
        Names the first thing that is wrong.
    """
    if data.get("plan_set_version") is not SET_VERSION or set(data) != {
        "plan_set_version",
        "plans",
    }:
        raise PlanError(
            f"plan_set_version is {data.get('plan_set_version')!r:.100}, this version reads "
            f"{SET_VERSION}, with plans beside it"
        )
    plans = data["plans"]
    if not isinstance(plans, list) or not plans:
        raise PlanError("at plans: a list of plans is needed, with at least one")
    found = []
    for i, plan in enumerate(plans):
        try:
            found.append(plan_from_dict(plan))
        except PlanError as error:
            raise PlanError(f"at plans[{i}]: {error}") from error
    return found


def _read(path: Path) -> Any:
    try:
        content = read_regular(path, MAX_FILE_BYTES)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT, "there is no such plan (plan.save(path) writes one)", str(path)
        ) from error
    except ValueError as error:
        raise _refused(f"{path} is not a plan: {error}") from error
    try:
        return read_json(content)
    except ValueError as error:
        raise _refused(
            f"{path} is not a plan: it is not JSON ({error}). Make "
            "the plan again, or copy the file again where that was cut short"
        ) from error


def _refused(message: str) -> PlanError:
    """An error in one line, whatever text the file contains."""
    return PlanError(printable(message))


def plan_to_dict(plan: PlanRecord) -> dict[str, Any]:
    """A plan as plain lists, strings and numbers that match the schema."""
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
        "device_name": plan.device_name,
        "budget_bytes": plan.budget_bytes,
        **({} if plan.budget_share is None else {"budget_share": plan.budget_share}),
        "headroom_bytes": plan.headroom_bytes,
        "costs": {
            "model": plan.costs.model,
            "device": plan.costs.device,
            "notes": list(plan.costs.notes),
        },
        "solver": {
            "name": plan.solver,
            "status": str(plan.status),
            "lower_bound_us": plan.lower_bound_us,
            "bound_scope": str(plan.bound_scope),
            "seed": plan.seed,
            "reorder": plan.reorder,
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
            "peak_by_category": _with_buffers(memory.by_category),
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
            **(
                {}
                if plan.guard.argument_bytes is None
                else {"argument_bytes": list(plan.guard.argument_bytes)}
            ),
        },
        "optimizer": None
        if plan.optimizer is None
        else {
            "name": plan.optimizer.name,
            "state_bytes": plan.optimizer.state_bytes,
            "workspace_bytes": plan.optimizer.workspace_bytes,
        },
        "loss": {
            "label": str(region.source),
            "held_bytes": region.held_bytes,
            "constant_bytes": region.constant_bytes,
            "workspace_bytes": region.workspace_bytes,
            "differentiated": list(plan.loss.differentiated),
            "tangents": [to_json(spec)["tensor"] for spec in plan.loss.tangents],
            **({"memory": list(map(asdict, plan.loss.memory))} if plan.loss.memory else {}),
        },
        "detached": list(plan.detached),
        "branch_free": plan.branch_free,
        **({"shapes": plan.shapes.to_json()} if plan.shapes.largest else {}),
        **({} if plan.holds == NOTHING_ELSE else {"loop_holds": plan.holds.to_json()}),
        **({} if plan.outcomes is None else {"outcomes": [o.to_json() for o in plan.outcomes]}),
        "operators": graph["operators"],
        "storages": graph["storages"],
        "schedule": list(plan.schedule.order),
    }


def plan_from_dict(data: Any) -> PlanRecord:
    """The inverse of :func:`plan_to_dict`.

    Raises
    ------
    PlanError
        Names the first thing that is wrong.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version is not SCHEMA_VERSION:
        raise PlanError(
            f"schema_version is {version!r}, this version reads {SCHEMA_VERSION}; "
            "make the plan again"
        )
    data = _with_scope_code(data)
    try:
        if not _compiled_schema().matches(data):
            raise PlanError(_what_is_wrong(data))
        json.dumps(data, ensure_ascii=False).encode()  # refuses half a surrogate pair
        plan = _build(data)
        peak_bytes = plan.predicted_peak_bytes  # raises if the order does not compute the step
        check_file_plan(plan)
        again = plan_to_dict(plan)
    except PlanError:
        raise
    except InvalidScheduleError as error:
        raise PlanError(f"the schedule does not compute the step: {error}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise PlanError(str(error)[:500]) from error
    if plan.fingerprint != data["fingerprint"]:
        raise PlanError("the graph does not have the fingerprint that the file names: damaged")
    if peak_bytes > plan.budget_bytes - plan.headroom_bytes:
        raise PlanError(
            f"the schedule peaks at {peak_bytes} bytes, above the budget of "
            f"{plan.budget_bytes} less a headroom of {plan.headroom_bytes}"
        )
    if plan.lower_bound_us > plan.predicted_step_us * (1 + 1e-9):
        raise PlanError(
            f"lower_bound_us is {plan.lower_bound_us}, but the schedule takes only "
            f"{plan.predicted_step_us}"
        )
    wrong = next(_differences(data, again, "$"), None)
    if wrong is not None:
        raise PlanError(wrong)
    return plan


def _with_scope_code(data: dict[str, Any]) -> dict[str, Any]:
    """The same with a code for ``bound_scope``, which older files have in words."""
    solver = data.get("solver")
    if not isinstance(solver, dict) or not isinstance(solver.get("bound_scope"), str):
        return data  # the schema says what is wrong with it
    return {**data, "solver": {**solver, "bound_scope": code_of(solver["bound_scope"])}}


def _differences(said: Any, found: Any, path: str) -> Iterator[str]:
    """Where a file differs from what its own graph and schedule give."""
    if isinstance(said, Mapping):
        for key in said:
            if key not in found:
                yield f"at {path}: {key!r:.100} is said, which its graph and schedule do not give"
            else:
                yield from _differences(said[key], found[key], f"{path}.{key}")
        missing = set(found) - set(said) - _ADDED_AFTER_VERSION_2
        if missing:
            yield f"at {path}: {min(missing)!r} is missing"
    elif isinstance(said, list):
        for i, (a, b) in enumerate(zip(said, found, strict=True)):
            yield from _differences(a, b, f"{path}[{i}]")
    elif said != found:
        yield f"at {path}: the file says {said!r:.100}, its graph and schedule give {found!r:.100}"


def _build(data: Mapping[str, Any]) -> PlanRecord:
    graph = CostGraph.from_dict(
        {
            "format": GRAPH_FORMAT,
            "operators": [_without(op, "runs") for op in data["operators"]],
            "storages": [_without(s, "decision") for s in data["storages"]],
        }
    )
    solver, prediction, call, loss = (data[k] for k in ("solver", "prediction", "call", "loss"))
    if "dict" not in call["arguments"]:
        raise ValueError("call.arguments must be arguments by name")
    counts = {len(loss["differentiated"]), len(loss["tangents"])}
    if "memory" in loss:
        counts.add(len(loss["memory"]))
    if len(counts) != 1 or len(set(loss["differentiated"])) != len(loss["differentiated"]):
        raise ValueError("loss.differentiated, loss.tangents and loss.memory do not fit")
    return PlanRecord(
        graph=graph,
        schedule=Schedule(tuple(data["schedule"])),
        guard=CallGuard(
            arguments=from_json(call["arguments"]),
            autocast=call["autocast"],
            evaluating=tuple(call["evaluating"]),
            state={name: _tensor(spec) for name, spec in call["state"].items()},
            argument_bytes=None if "argument_bytes" not in call else tuple(call["argument_bytes"]),
        ),
        budget_bytes=data["budget_bytes"],
        budget_share=data.get("budget_share"),
        baseline_peak_bytes=prediction["baseline_peak_bytes"],
        baseline_step_us=prediction["baseline_step_us"],
        lower_bound_us=solver["lower_bound_us"],
        bound_scope=BoundScope(solver["bound_scope"]),
        status=SolveStatus(solver["status"]),
        solver=solver["name"],
        solve_s=solver["solve_s"],
        seed=solver["seed"],
        log=tuple(solver["log"]),
        optimizer=None
        if data["optimizer"] is None
        else OptimizerStep(**data["optimizer"], step_ns=_optimizer_ns(graph)),
        loss=LossSpec(
            region=LossRegion(
                source=LossSource(loss["label"]),
                held_bytes=loss["held_bytes"],
                constant_bytes=loss["constant_bytes"],
                workspace_bytes=loss["workspace_bytes"],
            ),
            differentiated=tuple(loss["differentiated"]),
            tangents=tuple(_tensor(spec) for spec in loss["tangents"]),
            memory=tuple(TangentMemory(**place) for place in loss.get("memory", ())),
        ),
        never_recompute=tuple(data["rules"]["never_recompute"]),
        always_recompute=tuple(data["rules"]["always_recompute"]),
        reorder=solver.get("reorder", False),
        detached=tuple(data["detached"]),
        device_type=data["device_type"],
        device_name=data.get("device_name"),
        torch_version=data["torch_version"],
        costs=CostRecord(
            model=data["costs"]["model"],
            device=data["costs"]["device"],
            notes=tuple(data["costs"]["notes"]),
        ),
        headroom_bytes=data["headroom_bytes"],
        branch_free=data["branch_free"],
        shapes=ShapeRange.from_json(data.get("shapes", {})),
        outcomes=None
        if "outcomes" not in data
        else tuple(Outcome.from_json(o) for o in data["outcomes"]),
        holds=LoopHolds.from_json(data["loop_holds"]) if "loop_holds" in data else NOTHING_ELSE,
    )


def _with_buffers(by_category: Mapping[str, int]) -> dict[str, int]:
    """Count a library's workspace among the buffers, as files of this version do."""
    parts = dict(by_category)
    workspace_bytes = parts.pop(LIBRARY_WORKSPACE, 0)
    if workspace_bytes:
        parts["buffer"] = parts.get("buffer", 0) + workspace_bytes
    return parts


def _optimizer_ns(graph: CostGraph) -> int:
    return sum(
        op.cost_ns for op in graph.operators if op.phase == "optimizer" or op.target == CONSUME
    )


def _tensor(spec: Mapping[str, Any]) -> TensorSpec:
    return from_json({"tensor": spec})


def _without(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k != key}


def _decisions(plan: PlanRecord) -> list[str]:
    """The decision on each storage: resident, saved, recomputed or transient.

    *Saved* is alive from forward into backward; *transient* is not needed again.
    """
    phases = [plan.graph.operators[v].phase for v in plan.schedule.order]
    turn = phases.index("loss")
    repeats = plan.schedule.recomputed()
    decisions = [
        "resident" if s.producer is None else "recomputed" if s.producer in repeats else "transient"
        for s in plan.graph.storages
    ]
    for k, born, last in plan.replay.live:
        if born < turn < last:
            decisions[k] = "saved"
    return decisions


__all__ = ["SCHEMA_VERSION", "load_plan", "plan_from_dict", "plan_to_dict", "save_plan", "schema"]
