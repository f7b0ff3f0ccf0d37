"""What is solved and read once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import symbolic_trace
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from planner.compiled.fused_groups import fuse
from planner.compiled.priced_step import price_step
from planner.compiled.readings import name_of, peak_of
from solvers.schedule import Schedule
from tests.planner.compiled.test_joint_step import joint_step_of


def _name(factor: float, *, rows: int = 4, branch: Callable[..., Any] | None = None) -> str:
    x = torch.randn(rows, 6, requires_grad=True)
    step = joint_step_of(lambda x: (x * factor).sin().sum(), x)
    if branch is not None:
        step.module.add_module("true_graph_0", symbolic_trace(branch))
    fused = fuse(step)
    return name_of(price_step(step, groups=fused.groups, inner=fused.inner))


def test_a_step_has_the_same_name_each_time_it_is_captured() -> None:
    """So the next budget of a model finds what was read for the last one."""
    assert _name(3.0) == _name(3.0)


def test_other_numbers_and_other_sizes_are_another_step() -> None:
    """Constants and shapes change the generated code."""
    assert len({_name(3.0), _name(2.0), _name(3.0, rows=5)}) == 3


def test_branches_are_part_of_the_name() -> None:
    """The nodes of the graph around them show only where they are."""
    names = {_name(3.0), _name(3.0, branch=lambda x: x.sin()), _name(3.0, branch=lambda x: x.cos())}
    assert len(names) == 3


def test_settings_of_inductor_are_part_of_the_name() -> None:
    """They change the generated code, too."""
    before = _name(3.0)
    with torch._inductor.config.patch(max_fusion_size=7):
        assert _name(3.0) != before


def test_settings_of_pytorchs_partition_are_part_of_the_name() -> None:
    """It may be what a budget gets, and its peak is kept by the name."""
    before = _name(3.0)
    with torch._functorch.config.patch(aggressive_recomputation=True):
        assert _name(3.0) != before


def test_tags_of_checkpoints_are_part_of_the_name() -> None:
    """PyTorch's partition repeats what they say."""

    def name(saved: Any) -> str:
        def policy(_context: Any, func: Any, *_: Any, **__: Any) -> CheckpointPolicy:
            keep = func is saved
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        def loss(x: torch.Tensor) -> torch.Tensor:
            contexts = partial(create_selective_checkpoint_contexts, policy)
            made: torch.Tensor = checkpoint(
                lambda x: (x @ x).tanh(), x, use_reentrant=False, context_fn=contexts
            )
            return made.sum()

        step = joint_step_of(loss, torch.ones(4, 4, requires_grad=True))
        fused = fuse(step)
        return name_of(price_step(step, groups=fused.groups, inner=fused.inner))

    aten = torch.ops.aten
    assert len({name(aten.mm.default), name(aten.tanh.default), name(aten.mm.default)}) == 2


def test_a_schedule_is_read_once() -> None:
    """PyTorch's own partition, too, which has no schedule."""
    for schedule in (Schedule((0, 1)), None):
        asked: list[None] = []

        def read(told: list[None] = asked) -> int:
            told.append(None)
            return 7

        assert [peak_of("a name of this test", schedule, read) for _ in range(2)] == [7, 7]
        assert len(asked) == 1
