"""Results that Inductor writes over what it reads last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table

from planner.compiled.emit import emit, emit_held
from planner.compiled.expected_peak import expected_memory
from planner.compiled.fused_groups import fuse
from planner.compiled.lowered_peak import handed_over_bytes, lowered_extra_bytes
from planner.compiled.priced_step import PricedStep, price_step
from solvers.replay import replay
from solvers.schedule import Schedule
from tests.planner.compiled.test_joint_step import joint_step_of


def _priced(*, flipped: bool = False) -> PricedStep:
    """Two layers; backward of the second's function reads what forward saved for the last time."""

    def loss(x: Tensor, inward: Tensor, outward: Tensor) -> Tensor:
        hidden = (x @ inward).sin()
        hidden = hidden.flip(0) if flipped else hidden
        return (hidden @ outward).square().sum()

    return _priced_of(loss, (64, 16), (16, 256), (256, 16))


def _priced_of(function: Any, *shapes: tuple[int, ...]) -> PricedStep:
    inputs = (torch.randn(s, requires_grad=True) for s in shapes)
    step = joint_step_of(function, *inputs, decompositions=select_decomp_table())
    fused = fuse(step)
    return price_step(step, groups=fused.groups, inner=fused.inner)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("flipped", [False, True])
def test_it_is_the_peak_of_the_generated_code(flipped: bool) -> None:
    """A gradient takes the place of what its kernel reads last, unless that is not where it ends.

    Reversed rows are written elsewhere than they are read.
    """
    priced = _priced(flipped=flipped)
    everything = Schedule.keep_all(priced.graph)
    expected = expected_memory(priced, everything).peak_bytes
    own = replay(priced.graph, everything)
    forward, backward = emit_held(priced, everything)
    read = lowered_extra_bytes(forward, backward, len(priced.step.outputs))
    assert 0 < handed_over_bytes(forward) < read
    assert expected == priced.graph.resident_bytes + read
    assert (expected < own.peak_bytes) == (not flipped)


def test_what_a_library_writes_has_memory_of_its_own() -> None:
    """A matrix product is not written over what it reads."""

    def loss(x: Tensor) -> Tensor:
        return (x @ x).sum()

    priced = _priced_of(loss, (64, 64))
    everything = Schedule.keep_all(priced.graph)
    peak_bytes = replay(priced.graph, everything).peak_bytes
    assert expected_memory(priced, everything).peak_bytes == peak_bytes


def test_what_forward_hands_over_is_counted_once() -> None:
    """Its result and what is saved of it are one memory, and inputs are there anyway."""

    def loss(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (x @ weight).exp()
        return hidden, hidden.sum()

    priced = _priced_of(loss, (16, 32), (32, 64))
    forward, _ = emit(priced, Schedule.keep_all(priced.graph))
    assert handed_over_bytes(forward) == 16 * 64 * 4 + 4
