"""A schedule: the order in which operators run, repeats included."""

from __future__ import annotations

from dataclasses import dataclass

from graph_capture.cost_graph import CostGraph


@dataclass(frozen=True, slots=True)
class Schedule:
    """Operators in the order in which they run.

    ``order[i]`` is an index into ``CostGraph.operators``; the second and later
    occurrences of an index are recomputations. Frees are not written down: a
    use reads the latest version of a storage, and a version dies right after
    its last use, so there is never a reason to free it at another moment.
    The exception is a *kept* storage: its first version lives to the end, and
    every use reads that one.
    """

    order: tuple[int, ...]

    @classmethod
    def keep_all(cls, graph: CostGraph) -> Schedule:
        """The unplanned step: every operator once, in base order."""
        return cls(tuple(range(graph.num_operators)))

    def recomputed(self) -> dict[int, int]:
        """How often each operator runs again; operators that run once are absent."""
        runs: dict[int, int] = {}
        for v in self.order:
            runs[v] = runs.get(v, -1) + 1
        return {v: count for v, count in runs.items() if count > 0}
