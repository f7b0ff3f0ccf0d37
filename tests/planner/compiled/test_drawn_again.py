"""Draws from an earlier state of the generator."""

from __future__ import annotations

import pytest
import torch

from planner.compiled.drawn_again import draw_again, read_state


def test_the_same_numbers_come_again() -> None:
    """And the generator is where it was."""
    state = read_state("cpu")
    first = torch.rand(4)
    after = torch.get_rng_state()
    assert torch.equal(draw_again(state, torch.rand_like, torch.empty(4)), first)
    assert torch.equal(torch.get_rng_state(), after)


def test_an_error_leaves_the_generator_alone() -> None:
    """Even if the draw fails."""
    state = read_state("cpu")
    torch.rand(4)
    after = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        draw_again(state, torch.bernoulli, torch.full((2,), 3.0))
    assert torch.equal(torch.get_rng_state(), after)
