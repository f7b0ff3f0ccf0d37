"""Run one solve in a separate process: a graph comes in, JSON lines go out.

``python -m benchmarks.worker GRAPH BUDGET_BYTES SOLVER LIMIT_S SEED WORKERS``.
The process is separate because compiled code, HiGHS' scheduler and OR-tools are global
to a process. Everything that compiles or loads on first use is used once before the
clock starts. Lines: ``{"elapsed_s", "cost_ns", "bound_ns"}`` for each event as it
comes, and finally ``{"result": {…}}``.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from graph_capture.cost_graph import CostGraph
from solvers.instances import budget_of
from solvers.portfolio import SOLVERS, solve
from solvers.progress import ProgressEvent

from .instances import chain

COMPILED = ("local_search", "chain_dp")
"""Solvers of compiled code, which others use too."""


def main() -> None:
    path, budget_bytes, solver, limit_s, seed, workers = sys.argv[1:]
    graph = CostGraph.from_json(Path(path).read_text(encoding="utf-8"))
    warm_up(solver)
    result = solve(
        graph,
        int(budget_bytes),
        solver=solver,
        time_limit_s=float(limit_s),
        seed=int(seed),
        workers=int(workers),
        progress=say_event,
    )
    say(
        {
            "result": {
                "status": str(result.status),
                "cost_ns": result.cost_ns,
                "bound_ns": result.lower_bound_ns,
                "bound_scope": result.bound_scope,
                "global_bound_ns": result.global_bound_ns,
                "peak_bytes": result.peak_bytes,
                "solve_s": result.solve_s,
                "num_runs": len(result.schedule.order) if result.schedule else None,
            }
        }
    )


def warm_up(solver: str) -> None:
    """Run the solver on a small chain first. What fails here would fail in the solve, too.

    The limit is short: it does not cut compilation, only what comes after it.
    """
    small = chain(8, seed=0)
    for name in dict.fromkeys((*COMPILED, solver)):
        if name in SOLVERS:
            with contextlib.suppress(Exception):
                solve(small, budget_of(small, 0.6), solver=name, time_limit_s=0.5)


def say_event(event: ProgressEvent) -> None:
    say(
        {
            "elapsed_s": event.elapsed_s,
            "cost_ns": event.incumbent_ns,
            "bound_ns": event.bound_ns,
        }
    )


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
