"""Check that all processes of a job train by the same plan, before the first step.

Every process writes what decides its steps to the store through which the process group met, and
reads what the others wrote. No collective is used: a process that has another plan, none,
or is gone would leave the others waiting in one. Waiting ends after a time, with the names
of the processes that did not come.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from graph_capture.private_torch.processes import default_store

from ..errors import PlanError, PlanMismatchError
from ..plan_record import PlanRecord
from .attach import applied_plan, remove_plan

TIMEOUT_S = 300.0
_NO_PLAN = "no plan is applied"
_NUM_NAMED = 8

_num_checks: Counter[tuple[int, ...]] = Counter()  # so far, for each group of ranks


def check_same_plan(
    plan: PlanRecord | nn.Module, group: Any = None, *, timeout_s: float = TIMEOUT_S
) -> None:
    """Refuse to train where the processes of a group do not have the same plan.

    Every process of the group has to call this, as often as the others. Either all return,
    or all raise. Applying a plan to a ``DistributedDataParallel`` calls it, and so does applying
    a plan in blocks to a model that ``fully_shard`` has sharded.

    Parameters
    ----------
    plan
        The plan of this process, or the module that it is applied to.
    group
        A process group; ``None`` for all processes.
    timeout_s
        Seconds to wait for the others.

    Raises
    ------
    PlanMismatchError
        When two processes differ; names the ranks, and what differs.
    PlanError
        When a process does not come in time, or there is no process group.
    ValueError
        When ``timeout_s`` is not positive.
    """
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be a positive number of seconds, got {timeout_s!r}")
    if not (dist.is_available() and dist.is_initialized()):
        raise PlanError(
            "there is no process group whose plans could be compared: call "
            "torch.distributed.init_process_group first"
        )
    ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    rank = dist.get_rank()
    if rank not in ranks:
        raise PlanError(f"rank {rank} is not in the group of ranks {_named(ranks)}")
    decided = _decided(plan)
    said = _exchanged(decided, rank, ranks, timeout_s)
    different = {r: _differences(said[ranks[0]], said[r]) for r in ranks}
    others = [r for r in ranks if different[r]]
    if others:
        raise PlanMismatchError(
            f"the processes do not train by the same plan: {_words(ranks[0], others, said)}. "
            "Have one process plan and save, and all load its file"
        )
    if _NO_PLAN in decided.values():
        raise PlanMismatchError(
            "no plan is applied in any process: apply one before they are compared"
        )


def checked_everywhere(model: nn.Module) -> nn.Module:
    """Compare the plan that was just applied with the other processes', where there are any.

    Other than a bare module, a ``DistributedDataParallel`` is in the hands of every process of
    its group. A plan that is refused is removed again.

    Raises
    ------
    PlanMismatchError, PlanError
        As :func:`check_same_plan`.
    """
    if isinstance(model, DistributedDataParallel):
        try:
            check_same_plan(model, model.process_group)
        except PlanError:
            remove_plan(model)
            raise
    return model


def _decided(plan: PlanRecord | nn.Module) -> dict[str, str]:
    """What decides the steps of this process, in short, by name."""
    if isinstance(plan, nn.Module):
        applied = applied_plan(plan)
        if applied is None:
            return _in_blocks(plan)
        made_ahead = sorted(_hash(_of_plan(other)) for other in applied.other_plans)
        return {**_of_plan(applied.plan), "plans for other calls": _hash(made_ahead)}
    return {**_of_plan(plan), "plans for other calls": _hash([])}


def _in_blocks(model: nn.Module) -> dict[str, str]:
    """Likewise of plans inside a model's blocks."""
    found = {path: applied_plan(module) for path, module in model.named_modules()}
    plans = {path: _of_plan(applied.plan) for path, applied in found.items() if applied}
    return {"plans in blocks": _hash(plans)} if plans else {"plan": _NO_PLAN}


def _of_plan(plan: PlanRecord) -> dict[str, str]:
    return {
        "step": plan.fingerprint[:12],
        "schedule": _hash(list(plan.schedule.order)),
        "budget": f"{plan.budget_bytes} bytes",
        "loop": _hash(plan.holds.to_json()),
        "torch": plan.torch_version.partition("+")[0],
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _exchanged(
    decided: Mapping[str, str], rank: int, ranks: tuple[int, ...], timeout_s: float
) -> dict[int, dict[str, str]]:
    """What each process has decided, by its rank."""
    number = _num_checks[ranks]
    _num_checks[ranks] += 1
    group = "-".join(map(str, ranks)) if len(ranks) < dist.get_world_size() else "all"

    def key(of: int) -> str:
        return f"remat/same_plan/{group}/{number}/{of}"

    deadline = time.monotonic() + timeout_s
    said: dict[int, dict[str, str]] = {}
    try:
        store = default_store()
        store.set(key(rank), json.dumps(decided))
        while True:
            for r in ranks:
                if r not in said and store.check([key(r)]):
                    said[r] = json.loads(store.get(key(r)))
            left_s = deadline - time.monotonic()
            missing = [r for r in ranks if r not in said]
            if not missing or left_s <= 0:
                break
            _wait(store, key(missing[0]), min(left_s, 1.0))
    except RuntimeError as error:  # DistNetworkError among others
        raise PlanError(
            f"the plans of ranks {_named(ranks)} cannot be compared, since the store that the "
            f"processes share does not answer ({error}): has the process that holds it, most often "
            "rank 0, ended? Its own output says why"
        ) from error
    if missing:
        raise PlanError(
            f"rank {_named(missing)} did not come to compare plans within {timeout_s:g} s (rank "
            f"{rank} waited): it has ended, is still planning, or does not apply a plan. Its own "
            "output says which; every process has to apply the plan, or call check_same_plan"
        )
    return said


def _wait(store: Any, key: str, seconds: float) -> None:
    """Wait a moment for a key; whether it came is seen afterwards."""
    try:
        store.wait([key], timedelta(seconds=seconds))
    except dist.DistStoreError:
        return


def _differences(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [n for n in dict.fromkeys((*first, *other)) if first.get(n) != other.get(n)]


def _words(first: int, others: Sequence[int], said: Mapping[int, Mapping[str, str]]) -> str:
    rank = others[0]
    for who, whose in ((first, rank), (rank, first)):
        if said[who].get("plan") == _NO_PLAN:
            return f"{_NO_PLAN} on rank {who}, but one is on rank {whose}"
    parts = ", ".join(
        f"{name} {said[first].get(name)} and {said[rank].get(name)}"
        for name in _differences(said[first], said[rank])
    )
    more = f" (and {len(others) - 1} more differ from rank {first})" if len(others) > 1 else ""
    return f"ranks {first} and {rank} have {parts}{more}"


def _named(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_NUM_NAMED]))
    return named if len(ranks) <= _NUM_NAMED else f"{named} and {len(ranks) - _NUM_NAMED} more"


__all__ = ["TIMEOUT_S", "check_same_plan", "checked_everywhere"]
