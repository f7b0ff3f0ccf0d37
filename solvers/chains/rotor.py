"""rotor: the optimal persistent schedule of a chain whose stages save their input or everything.

Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova, *Optimal checkpointing for
heterogeneous chains: how to train deep neural networks with limited memory*
(arXiv:1911.13214), Section 4. Each time a stage runs forward, either all that its
backward part reads is saved, or its input alone, or nothing; in the recurrence of
``chains/table.py`` the first is the one option that every block has, the other two
are the splits.

In the paper's software, stages are the modules of a sequential model. Here they are the
given stretches of operators, and outside of them the chain's own blocks.

Guarantee: the best persistent schedule of the chain of stages, up to the slots.
Known imperfection: the table counts memory in slots; replay judges the result.
"""

from __future__ import annotations

from collections.abc import Sequence

from graph_capture.cost_graph import CostGraph

from ..arrays import GraphArrays, graph_arrays
from ..checked import checked_budget
from ..uniform import turning_point
from .chain import Chain, coarsen, find_chain
from .chain_dp import small_enough
from .problem import ChainOutcome, ChainProblem, no_schedule

MOST_TABLE_S = 2.0
"""What the table may take; by that, and not by the clock, its slots are chosen."""


def rotor(
    graph: CostGraph,
    budget_bytes: int,
    *,
    stages: Sequence[range] = (),
    time_limit_s: float = MOST_TABLE_S,
) -> ChainOutcome:
    """Find rotor's fastest schedule within ``budget_bytes``.

    Parameters
    ----------
    stages
        Stretches of the forward pass that are not cut inside. Where fewer than
        half of them begin where the chain can be cut, and where there are none,
        the stages are the finest chain's blocks.
    time_limit_s
        Sets the number of slots, with :data:`MOST_TABLE_S` at most.
    """
    budget_bytes = checked_budget(budget_bytes)
    g = graph_arrays(graph)
    finest = find_chain(g, turning_point(graph))
    if finest is None:
        return no_schedule(0, "not a chain: hardly any position is crossed by one storage alone")
    (chain,) = small_enough(g, [chain_of_stages(g, finest, stages)])
    problem = ChainProblem(graph, g, chain)
    problem.add_everything()
    return problem.solve(budget_bytes, min(time_limit_s, MOST_TABLE_S))


def chain_of_stages(g: GraphArrays, finest: Chain, stages: Sequence[range]) -> Chain:
    """Return ``finest`` without its cuts inside ``stages``; unchanged where it does not part
    them."""
    parted = {stage.start for stage in stages}.intersection(finest.cuts)
    if not stages or 2 * len(parted) < len(stages):
        return finest
    inside = {v for stage in stages for v in stage[1:]}
    return coarsen(g, finest, [cut for cut in finest.cuts if cut not in inside])
