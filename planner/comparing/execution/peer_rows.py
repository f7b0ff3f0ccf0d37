"""The peers of a comparison: which take part, and their rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from graph_capture.cost_graph import CostGraph
from graph_capture.suggestions import unknown_name
from solvers.strategies import StrategyError, module_blocks

from ...comparison_record import ComparisonRow
from ..budgets import NamedBudget
from ..events import ProgressReporter
from .runner import (
    Execution,
    outcome_of,
    said,
)

if TYPE_CHECKING:
    from ..peers import Peer


def choose_peers(peers: Iterable[str | Peer]) -> tuple[Peer, ...]:
    """Return the requested peers.

    Raises
    ------
    ValueError
        When a name is unknown; lists the known ones.
    """
    if isinstance(peers, str) or not isinstance(peers, Iterable):
        raise ValueError(f"peers is a sequence of names, got {peers!r}: write [{peers!r}]")
    wanted = tuple(peers)
    if not wanted:
        return ()
    from ..peers import PEERS, Peer  # loads the parts of torch that compile

    chosen: dict[str, Peer] = {}
    for peer in wanted:
        if isinstance(peer, Peer):
            chosen[peer.name] = peer
        elif peer in PEERS:
            chosen[peer] = PEERS[peer]
        else:
            raise ValueError(unknown_name("peer", str(peer), PEERS))
    return tuple(chosen.values())


def peer_rows(
    peers: Iterable[Peer],
    graph: CostGraph,
    execution: Execution,
    tell: ProgressReporter,
    budgets: Sequence[NamedBudget] = (),
) -> list[ComparisonRow]:
    """Make a row for each peer, run alongside eager; one at each budget if it works towards one.

    Parameters
    ----------
    graph
        The graph of the captured step, whose blocks are the peers' blocks.
    """
    rows = []
    for peer in peers:
        for budget in budgets if peer.needs_budget and budgets else (None,):
            tell.expect(1)
            at = "" if budget is None else f" at {budget.label}"
            tell(f"{peer.name}{at}, as its users run it")
            rows.append(_row(peer, graph, budget, execution))
    return rows


def _blocks(graph: CostGraph) -> tuple[str, ...] | None:
    """Paths of the blocks; ``None`` if there are none, which a peer that needs them reports."""
    try:
        return tuple(dict.fromkeys(block.name for block in module_blocks(graph).blocks))
    except StrategyError:
        return None


def _beside_bytes(graph: CostGraph) -> int:
    """What is on the device all step long and is no parameter."""
    resident = (s for s in graph.storages if s.producer is None)
    return sum(s.size_bytes for s in resident if s.category != "parameter")


def _row(peer: Peer, graph: CostGraph, budget: NamedBudget | None, e: Execution) -> ComparisonRow:
    from .run_peer import run_peer

    label, num_bytes = ("", None) if budget is None else (budget.label, budget.num_bytes)
    try:
        row = run_peer(
            peer,
            e.spec.model,
            e.spec.sample_input,
            loss_fn=e.spec.loss_fn,
            optimizer=e.spec.optimizer,
            repeats=e.repeats,
            seed=e.seed,
            blocks=_blocks(graph),
            holds=e.spec.holds,
            budget_bytes=num_bytes,
            beside_bytes=_beside_bytes(graph),
            cost_model=e.spec.cost_model,
        )
        return replace(row, budget=label)
    # Another tool may fail in any way, in its own code: its row reports it.
    except Exception as error:  # noqa: BLE001
        return ComparisonRow(
            strategy=peer.name,
            kind="peer",
            budget=label,
            budget_bytes=num_bytes,
            error=said(error, "when it ran"),
            outcome=outcome_of(error),
        )
