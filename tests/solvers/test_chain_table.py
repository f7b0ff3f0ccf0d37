from __future__ import annotations

import math

import numpy as np
import pytest

from solvers.chains.table import NEVER, ChainFigures, fill_table, row


def unit_chain(num_blocks: int) -> ChainFigures:
    """Blocks of unit boundaries whose backward parts need the boundary alone and cost nothing.

    Running forward replaces a boundary by the next one, as in the revolve paper,
    and so does the last block's forward part, which the backward part follows at once.
    """
    forward_bytes = np.full(num_blocks, 2, dtype=np.int64)
    forward_bytes[-1] = 1
    ones = np.ones(num_blocks, dtype=np.int64)
    zeros = np.zeros(num_blocks, dtype=np.int64)
    return ChainFigures(
        boundary_bytes=ones,
        advance_first_ns=ones,
        advance_again_ns=ones,
        advance_bytes=2 * ones,
        advance_free_bytes=ones,
        held_first_bytes=zeros,
        held_again_bytes=zeros,
        ptr=np.arange(num_blocks + 1),
        saved_bytes=ones,
        forward_bytes=forward_bytes,
        inner_bytes=zeros,
        back_bytes=ones,
        first_ns=ones,
        again_ns=ones,
        inner_ns=zeros,
        back_ns=zeros,
    )


def revolve_cost(num_steps: int, num_saved: int) -> int:
    """Griewank and Walther (ACM TOMS 26, 2000), Proposition 1: r l - beta(s + 1, r - 1).

    The first sweep's last step, which their count leaves out, is added.
    """
    repeats = 0
    while math.comb(num_saved + repeats, num_saved) < num_steps:
        repeats += 1
    beta = math.comb(num_saved + repeats, repeats - 1) if repeats else 0
    return repeats * num_steps - beta + 1


@pytest.mark.parametrize("num_saved", [1, 2, 3, 5])
def test_a_unit_chain_costs_what_revolve_costs(num_saved: int) -> None:
    """For 1 to 20 steps, s saved boundaries and one in flight give the binomial optimum."""
    for num_steps in range(1, 21):
        table = fill_table(unit_chain(num_steps), num_saved + 1, 1)
        whole = table.cost[row(0, num_steps - 1, num_steps)]
        assert whole[num_saved + 1] == revolve_cost(num_steps, num_saved)


def test_too_little_memory_costs_never() -> None:
    """Two unit blocks do not fit in one slot: the first one's boundary must stay."""
    table = fill_table(unit_chain(2), 3, 1)
    assert list(table.cost[row(0, 1, 2)]) == [NEVER, NEVER, 2, 2]


def test_more_memory_never_costs_more() -> None:
    """Each row falls from left to right."""
    table = fill_table(unit_chain(15), 12, 1)
    assert (np.diff(table.cost, axis=1) <= 0).all()


def test_rows_are_numbered_without_gaps() -> None:
    """All pairs with i <= j, one row each."""
    rows = [row(i, j, 7) for i in range(7) for j in range(i, 7)]
    assert rows == list(range(28))
