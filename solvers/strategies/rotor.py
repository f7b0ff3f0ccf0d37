"""rotor (Beaumont et al., arXiv:1911.13214) on the blocks of a model.

Its dynamic program is ``chains/rotor.py``. A stage is a block of the model
(``strategies/blocks.py``); what lies outside of the blocks is cut wherever the
chain can be cut, as is a model without blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from graph_capture.cost_graph import CostGraph

from ..chains import rotor
from ..replay import replay
from ..schedule import Schedule
from .blocks import module_blocks
from .strategy import Candidate, Strategy, StrategyError, StrategyFailure, StrategyOptions


def _propose(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    budget_bytes = options.budget_bytes
    if budget_bytes is None:
        raise StrategyError("rotor needs a budget; give budget_bytes")
    schedule = Schedule.keep_all(graph)
    if replay(graph, schedule).peak_bytes <= budget_bytes:
        yield Candidate(schedule=schedule, note="everything is saved")
        return
    outcome = rotor.rotor(
        graph, budget_bytes, stages=_stages(graph), time_limit_s=options.time_limit_s
    )
    if outcome.schedule is None:
        raise StrategyError(
            f"rotor: no schedule found in {budget_bytes} bytes ({outcome.reason})",
            StrategyFailure.NOTHING_FOUND,
        )
    note = f"{outcome.num_blocks} stages, {outcome.num_slots} slots"
    yield Candidate(schedule=outcome.schedule, note=note)


def _stages(graph: CostGraph) -> list[range]:
    """The blocks that module paths name; none where they name none."""
    try:
        return [range(block.begin, block.end) for block in module_blocks(graph).blocks]
    except StrategyError:
        return []


ROTOR = Strategy(
    name="rotor",
    summary="optimal persistent schedule of a chain; a stage saves its input or everything",
    source="Beaumont et al., arXiv:1911.13214",
    propose=_propose,
    needs_budget=True,
)
