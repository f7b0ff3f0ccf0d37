"""Apply a plan on all processes of a job or on none, and see that it is the same one.

Every process says what decides its steps, or why it could not apply the plan
(``exchange.py``); then all go on, or none does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from graph_capture.calls.spread_out import mesh_of
from graph_capture.loop.data_parallel import ranks_of

from ..errors import PlanError, PlanMismatchError
from ..plan_record import PlanRecord
from .attach import applied_plan, remove_plan
from .exchange import Exchange, named

TIMEOUT_S = 300.0
_NO_PLAN = "no plan is applied"


def check_same_plan(
    plan: PlanRecord | nn.Module, group: Any = None, *, timeout_s: float = TIMEOUT_S
) -> None:
    """Refuse to train where the processes of a group do not have the same plan.

    Every process of the group has to call this, as often as the others. Either all return,
    or all raise. Applying a plan to a ``DistributedDataParallel`` does the same, and so does
    applying a plan in blocks to a model that ``fully_shard`` has sharded.

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
        When a process fails or does not come in time, or there is no process group.
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
        raise PlanError(f"rank {rank} is not in the group of ranks {named(ranks)}")
    _agree(Exchange(ranks), plan, timeout_s)


@contextmanager
def on_all_ranks(plan: PlanRecord | nn.Module, ranks: Sequence[int] | None) -> Iterator[None]:
    """Apply a plan on every process of a group or on none.

    What is done meanwhile applies it. An error there is raised on the other processes, too, with
    the rank and the reason, and so is one where the plans are not the same. Whoever uses
    this takes back what it has applied if anything is raised.

    Parameters
    ----------
    plan
        The plan, or the module that it is being applied to.
    ranks
        All processes that apply it; ``None`` where this one is alone.

    Raises
    ------
    PlanMismatchError, PlanError
        As :func:`check_same_plan`.
    """
    if ranks is None:
        yield
        return
    exchange = Exchange(ranks)
    with exchange.at_work():
        yield
    _agree(exchange, plan, TIMEOUT_S)


@contextmanager
def applied_everywhere(model: nn.Module) -> Iterator[None]:
    """Likewise for a plan of a whole step, whose module is in the hands of several processes.

    Other than a bare module, a ``DistributedDataParallel``, or a module that ``replicate`` was
    called on, is in the hands of every process of its group, and a model that
    ``parallelize_module`` has divided in those of its mesh. A plan that is refused is removed
    again. So is an earlier one where there are other processes, which may have replaced it.
    """
    ranks = ranks_of(model) or ranks_dividing(model)
    before = applied_plan(model)
    try:
        with on_all_ranks(model, ranks):
            yield
    except BaseException:
        now = applied_plan(model)
        is_earlier = now is not None and before is not None and now.plan is before.plan
        if now is not None and not (is_earlier and ranks is None):
            remove_plan(model)
        raise


def _agree(exchange: Exchange, plan: PlanRecord | nn.Module, timeout_s: float) -> None:
    """Say what decides the steps of this process, and refuse to go on if others differ."""
    decided, ranks = _decided(plan), exchange.ranks
    said = exchange.reports(decided, timeout_s)
    others = [r for r in ranks if _differences(said[ranks[0]], said[r])]
    if others:
        raise PlanMismatchError(
            f"the processes do not train by the same plan: {_words(ranks[0], others, said)}. "
            "Have one process plan and save, and all load its file"
        )
    if _NO_PLAN in decided.values():
        raise PlanMismatchError(
            "no plan is applied in any process: apply one before they are compared"
        )


def ranks_dividing(model: nn.Module) -> Sequence[int] | None:
    """Return the processes among which ``parallelize_module`` has divided a model."""
    meshes = [mesh for p in model.parameters() if (mesh := mesh_of(p)) is not None]
    if not meshes:
        return None
    ranks: list[int] = max(meshes, key=lambda mesh: int(mesh.size())).mesh.flatten().tolist()
    return ranks


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


__all__ = ["TIMEOUT_S", "applied_everywhere", "check_same_plan", "on_all_ranks", "ranks_dividing"]
