"""Block plans as JSON: the whole step's plan, each block's plan, and which block has which.

Each of the plans is a plan file's content, and is checked like one
(``planner/saving/serialize.py``). Beyond that, the step must be made of its blocks: their
operators at their figures, in the order of their own schedules.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graph_capture.json_text import read_json
from graph_capture.printable import printable
from graph_capture.regular_file import read_regular

from ..base.atomic_write import write_whole
from ..errors import PlanError
from ..plan_record import PlanRecord
from ..saving.serialize import MAX_FILE_BYTES, plan_from_dict, plan_to_dict
from .block_record import BlockParts, WholeStep, check_parts

BLOCK_PLAN_VERSION = 1
_KEYS = {"block_plan_version", "step", "blocks", "plans", "measured", "whole_step"}


def save_block_plan(step: PlanRecord, parts: BlockParts, path: Path) -> None:
    """Write a block plan beside ``path`` and move it there when it is complete.

    Raises
    ------
    PlanError
        When a planned call has an argument that JSON cannot hold.
    OSError
        When the file cannot be written; an earlier file stays as it was.
    """
    data = {
        "block_plan_version": BLOCK_PLAN_VERSION,
        "step": plan_to_dict(step),
        "blocks": dict(parts.plan_of),
        "plans": [plan_to_dict(plan) for plan in parts.plans],
        "measured": parts.measured,
        "whole_step": None if parts.whole is None else asdict(parts.whole),
    }
    try:
        text = json.dumps(data, indent=1, allow_nan=False)
        block_plan_from_dict(read_json(text))  # what cannot be read again is not written
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"this plan cannot be written to a file: {error}") from error
    write_whole(path, text)


def is_block_plan(path: Path) -> bool:
    """Whether a file says that it is a block plan; other files and none are not."""
    try:
        data = read_json(read_regular(path, MAX_FILE_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(data, Mapping) and "block_plan_version" in data


def load_block_plan(path: Path) -> tuple[PlanRecord, BlockParts]:
    """Read a block plan; see :meth:`planner.BlockPlan.load`."""
    try:
        data = read_json(read_regular(path, MAX_FILE_BYTES))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT, "there is no such plan (plan.save(path) writes one)", str(path)
        ) from error
    except ValueError as error:
        raise PlanError(printable(f"{path} is not a plan: {error}")) from error
    try:
        return block_plan_from_dict(data)
    except PlanError as error:
        raise PlanError(printable(f"{path} is not a usable plan: {error}")) from error


def block_plan_from_dict(data: Any) -> tuple[PlanRecord, BlockParts]:
    """Invert what :func:`save_block_plan` writes.

    Raises
    ------
    PlanError
        Names the first thing that is wrong.
    """
    if isinstance(data, Mapping) and "schema_version" in data:
        raise PlanError("it is a plan of a whole step: read it with Plan.load")
    version = data.get("block_plan_version") if isinstance(data, Mapping) else None
    if version is not BLOCK_PLAN_VERSION:
        raise PlanError(
            f"block_plan_version is {version!r:.100}, this version reads {BLOCK_PLAN_VERSION}; "
            "make the plan again"
        )
    if set(data) != _KEYS:
        odd = sorted(set(data) ^ _KEYS)[0]
        raise PlanError(f"{odd!r:.100} is missing, or is no part of a block plan")
    plans = data["plans"]
    if not isinstance(plans, list) or not plans:
        raise PlanError("at plans: a list of plans is needed, with at least one")
    plan_of = _plan_of(data["blocks"], len(plans))
    if not isinstance(data["measured"], bool):
        raise PlanError(f"at measured: true or false is needed, got {data['measured']!r:.100}")
    parts = BlockParts(
        plans=tuple(_plan(plan, f"plans[{i}]") for i, plan in enumerate(plans)),
        plan_of=plan_of,
        measured=data["measured"],
        whole=_whole(data["whole_step"]),
    )
    step = _plan(data["step"], "step")
    check_parts(step, parts)
    return step, parts


def _plan(data: Any, place: str) -> PlanRecord:
    try:
        return plan_from_dict(data)
    except PlanError as error:
        raise PlanError(f"at {place}: {error}") from error


def _plan_of(data: Any, num_plans: int) -> dict[str, int]:
    if not isinstance(data, Mapping) or not data:
        raise PlanError("at blocks: the path of each block and the index of its plan are needed")
    for path, i in data.items():
        if not path or isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < num_plans:
            raise PlanError(f"at blocks: {path!r:.100} has no plan {i!r:.100}")
    if set(data.values()) != set(range(num_plans)):
        raise PlanError("at plans: one belongs to no block")
    return dict(data)


def _whole(data: Any) -> WholeStep | None:
    if data is None:
        return None
    if not isinstance(data, Mapping) or set(data) != {"step_us", "lower_bound_us"}:
        raise PlanError("at whole_step: step_us and lower_bound_us are needed")
    for key, value in data.items():
        absent = value is None and key == "step_us"
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not absent and not (number and 0 <= value < 2**62):
            raise PlanError(f"at whole_step.{key}: {value!r:.100} is no time in microseconds")
    return WholeStep(**data)
