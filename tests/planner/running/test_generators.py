"""Rewinding the generator for a repeated draw."""

from __future__ import annotations

import torch

from graph_capture.costs.allocator import peak_extra_bytes
from planner.running.generators import (
    read_cpu_generator,
    resume_cpu_generator,
    rewind_cpu_generator,
)


def _drawn_again() -> torch.Tensor:
    state = read_cpu_generator()
    resume_cpu_generator(rewind_cpu_generator(state))
    return state


def test_rewinding_takes_no_memory_beside_the_recorded_state() -> None:
    """Repeated draws are planned for with that state alone."""
    assert peak_extra_bytes(_drawn_again) == torch.get_rng_state().nbytes


def test_the_recorded_state_may_be_used_again() -> None:
    """Also by a backward pass through saved tensors, which asks for their version."""
    state = read_cpu_generator()
    version, recorded, first = state._version, state.clone(), torch.rand(3)
    after = torch.get_rng_state()
    for _ in range(2):
        before = rewind_cpu_generator(state)
        assert torch.equal(torch.rand(3), first)
        resume_cpu_generator(before)
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(state, recorded)
    assert state._version == version
