"""The peers of a comparison: which take part, and their rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from graph_capture.cost_graph import CostGraph
from graph_capture.suggestions import unknown_name
from solvers.strategies import StrategyError, module_blocks

from ...comparison_record import ComparisonRow
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
    peers: Iterable[Peer], graph: CostGraph, execution: Execution, tell: ProgressReporter
) -> list[ComparisonRow]:
    """Make a row for each peer, run alongside eager.

    Parameters
    ----------
    graph
        The graph of the captured step, whose blocks are the peers' blocks.
    """
    blocks = _blocks(graph)
    rows = []
    for peer in peers:
        tell.expect(1)
        tell(f"{peer.name}, as its users run it")
        rows.append(_row(peer, blocks, execution))
    return rows


def _blocks(graph: CostGraph) -> tuple[str, ...] | None:
    """Paths of the blocks; ``None`` if there are none, which a peer that needs them reports."""
    try:
        return tuple(dict.fromkeys(block.name for block in module_blocks(graph).blocks))
    except StrategyError:
        return None


def _row(peer: Peer, blocks: tuple[str, ...] | None, e: Execution) -> ComparisonRow:
    from .run_peer import run_peer

    try:
        return run_peer(
            peer,
            e.spec.model,
            e.spec.sample_input,
            loss_fn=e.spec.loss_fn,
            optimizer=e.spec.optimizer,
            repeats=e.repeats,
            seed=e.seed,
            blocks=blocks,
            holds=e.spec.holds,
        )
    # Another tool may fail in any way, in its own code: its row reports it.
    except Exception as error:  # noqa: BLE001
        return ComparisonRow(
            strategy=peer.name,
            kind="peer",
            error=said(error, "when it ran"),
            outcome=outcome_of(error),
        )
