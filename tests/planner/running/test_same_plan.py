"""Processes of one job with other plans, with none, and with one that has ended."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from planner import (
    Plan,
    PlanError,
    PlanMismatchError,
    applied_plan,
    check_same_plan,
    optimize,
)
from planner.running import exchange
from tests.planner.small import make, plan_for, sample, square
from tests.ranks import spawn_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed")
TWO_PROCESSES = pytest.mark.distributed


def test_without_a_process_group_there_is_nobody_to_ask() -> None:
    """The message says what to call first."""
    with pytest.raises(PlanError, match="init_process_group first"):
        check_same_plan(make())


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/it", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_process_agrees_with_itself() -> None:
    """By its plan, and by the module that it is applied to; time has to be given."""
    plan = optimize(make(), sample(), budget_gb=1, loss_fn=square)
    check_same_plan(plan)
    check_same_plan(plan.apply(make()))
    with pytest.raises(PlanMismatchError, match="no plan is applied in any process"):
        check_same_plan(make())
    with pytest.raises(ValueError, match="timeout_s must be a positive number"):
        check_same_plan(plan, timeout_s=0)


# -- two processes -----------------------------------------------------------------------


def _same(rank: int, plans: list[Plan]) -> None:
    check_same_plan(plans[0])
    wrapper = plans[0].apply(DistributedDataParallel(make()))
    square(wrapper(sample(rank))).backward()
    assert applied_plan(wrapper).planned_steps == 1


def _another(rank: int, plans: list[Plan]) -> None:
    wrapper = DistributedDataParallel(make())
    plans[rank].apply(wrapper)


def _another_is_not_applied(rank: int, plans: list[Plan]) -> None:
    wrapper = DistributedDataParallel(make())
    try:
        plans[rank].apply(wrapper)
    except PlanMismatchError:
        assert applied_plan(wrapper) is None
        square(wrapper(sample(rank))).backward()
        return
    raise AssertionError("another plan was not noticed")


def _none_on_one(rank: int, plans: list[Plan]) -> None:
    model = make()
    if rank == 0:
        plans[0].apply(model)
    check_same_plan(model)


def _one_cannot_apply(rank: int, plans: list[Plan]) -> None:
    wrapper = DistributedDataParallel(make())
    if rank == 1:
        wrapper.module.head = torch.nn.Linear(32, 5)
    began = time.monotonic()
    try:
        plans[0].apply(wrapper)
    finally:
        assert applied_plan(wrapper) is None
        assert time.monotonic() - began < 20


def _one_cannot_replace(rank: int, plans: list[Plan]) -> None:
    """A plan that both have."""
    wrapper = plans[0].apply(DistributedDataParallel(make()))
    if rank == 1:
        wrapper.module.head = torch.nn.Linear(32, 5)
    try:
        plans[1].apply(wrapper)
    finally:
        assert applied_plan(wrapper) is None


def _one_ends_at_work(rank: int, plans: list[Plan]) -> None:
    """In the capture, while the other waits."""
    model = make()
    if rank == 1:
        model.dropout.register_forward_pre_hook(lambda module, args: os._exit(0))
    exchange.BEAT_S, exchange.SILENT_S = 0.1, 1.0
    began = time.monotonic()
    try:
        plans[0].apply(DistributedDataParallel(model))
    finally:
        assert time.monotonic() - began < 20


def _one_comes_late(rank: int, plans: list[Plan]) -> None:
    """After the other has given up; then both compare other plans."""
    if rank == 1:
        time.sleep(3)
    try:
        check_same_plan(plans[0], timeout_s=0.5)
    except PlanError as error:
        try:
            check_same_plan(plans[rank])
        except PlanMismatchError:
            raise error from None


def _one_is_slow(rank: int, plans: list[Plan]) -> None:
    if rank == 1:
        time.sleep(3 * exchange.BEAT_S)
    check_same_plan(plans[0])


def _the_store_ends(rank: int, plans: list[Plan]) -> None:
    if rank == 0:
        return
    time.sleep(1)
    check_same_plan(plans[0], timeout_s=3)


TOGETHER = (
    _same,
    _another,
    _another_is_not_applied,
    _none_on_one,
    _one_cannot_apply,
    _one_cannot_replace,
    _one_comes_late,
    _one_ends_at_work,
)
"""One after the other in the same two processes; in the last of them one ends."""


def _process(
    rank: int, works: tuple[Callable[[int, list[Plan]], None], ...], folder: str, meeting: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for work in works:
        said = "nothing"
        try:
            work(rank, [Plan.load(f"{folder}/{i}.json") for i in range(2)])
        except PlanError as error:
            said = f"{type(error).__name__}: {error}"
        Path(folder, f"{work.__name__}.{rank}.txt").write_text(said)


def _run(
    works: tuple[Callable[[int, list[Plan]], None], ...], folder: Path, meeting: str | None = None
) -> None:
    """Have two processes do this, which meet at a port unless told otherwise."""
    if meeting is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    spawn_ranks(_process, (works, str(folder), meeting), nprocs=2)


def _said(work: Callable[[int, list[Plan]], None], folder: Path) -> list[str]:
    """What each process said."""
    return [(folder / f"{work.__name__}.{rank}.txt").read_text() for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plans of one step, with other budgets and schedules, and what was said of them."""
    place = tmp_path_factory.mktemp("plans")
    whole = optimize(make(), sample(), budget_gb=1, loss_fn=square)
    whole.save(place / "0.json")
    plan_for(make(), sample(), loss_fn=square).save(place / "1.json")
    _run(TOGETHER, place)
    return place


@TWO_PROCESSES
def test_the_same_plan_trains(folder: Path) -> None:
    """Nobody says anything."""
    assert _said(_same, folder) == ["nothing", "nothing"]


@TWO_PROCESSES
def test_another_plan_is_an_error_on_both(folder: Path) -> None:
    """The message names the ranks and what differs."""
    for said in _said(_another, folder):
        assert said.startswith("PlanMismatchError: the processes do not train by the same plan")
        assert "ranks 0 and 1 have schedule" in said


@TWO_PROCESSES
def test_a_refused_plan_is_not_left_applied(folder: Path) -> None:
    """Both may go on without one."""
    assert _said(_another_is_not_applied, folder) == ["nothing", "nothing"]


@TWO_PROCESSES
def test_a_process_without_a_plan_is_an_error_on_both(folder: Path) -> None:
    """The message says which rank has none."""
    for said in _said(_none_on_one, folder):
        assert "no plan is applied on rank 1, but one is on rank 0" in said


@TWO_PROCESSES
def test_an_error_on_one_is_an_error_on_both(folder: Path) -> None:
    """At once, with the rank and the reason; nothing is applied."""
    others, own = _said(_one_cannot_apply, folder)
    assert own.startswith("PlanMismatchError: ")
    assert others.startswith("PlanError: rank 1 could not apply the plan, so that no process does")
    assert own.partition(": ")[2] in others


@TWO_PROCESSES
def test_an_earlier_plan_that_one_cannot_replace_is_left_to_none(folder: Path) -> None:
    """Processes with and without a plan would train by different schedules."""
    others, _ = _said(_one_cannot_replace, folder)
    assert others.startswith("PlanError: rank 1 could not apply the plan, so that no process does")


@TWO_PROCESSES
def test_a_process_that_ends_while_it_applies_is_named(folder: Path) -> None:
    """In seconds: it gives no sign of life any more."""
    said = (folder / "_one_ends_at_work.0.txt").read_text()
    assert said.startswith("PlanError: rank 1 has ended while it applied the plan")


@TWO_PROCESSES
def test_a_process_that_does_not_come_is_named_by_the_other(folder: Path) -> None:
    """After a time, without a hang. Come late, it hears of that, and both are in step again."""
    waited, late = _said(_one_comes_late, folder)
    assert "rank 1 did not come to compare plans within 0.5 s" in waited
    assert "rank 0 could not apply the plan, so that no process does" in late


@TWO_PROCESSES
def test_processes_that_met_in_a_file_wait_for_each_other(folder: Path) -> None:
    """Whose store says in another way that a moment is over."""
    _run((_one_is_slow,), folder, f"file://{folder}/meeting")
    assert _said(_one_is_slow, folder) == ["nothing", "nothing"]


@TWO_PROCESSES
def test_a_store_that_has_gone_is_named(folder: Path) -> None:
    """It lies in rank 0, whose end the other notices."""
    _run((_the_store_ends,), folder)
    said = _said(_the_store_ends, folder)[1]
    assert "does not answer" in said or "rank 0 did not come" in said
