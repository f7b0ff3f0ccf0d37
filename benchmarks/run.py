"""Run a solver on an instance at a budget, and report when it reached what."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from solvers.instances import budget_of
from solvers.result import OPTIMAL_GAP
from solvers.scopes import BoundScope

from .instances import Instance

ROOT = Path(__file__).parent.parent
START_S = 120.0
"""Time that a child may need before and after the solve: imports, compilation, warm-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Best schedule and bound of a solve from ``elapsed_s`` on; no schedule is ``None``."""

    elapsed_s: float
    cost_ns: int | None
    bound_ns: int

    @property
    def gap(self) -> float:
        """``(cost - bound) / bound``; infinite without a schedule."""
        return gap_of(self.cost_ns, self.bound_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The result of one solve.

    Parameters
    ----------
    budget
        Share of the keep-all peak.
    status
        The solver's own status; ``"broken"`` if it raised, crashed or hung.
    bound_scope
        What the bound covers; bounds of different scopes are not compared.
    global_bound_ns
        The final bound on every schedule whose first runs keep the base order.
    moments
        In order of time; the last one is the result, if there is one.
    error
        Why it is broken; empty if it is not.
    """

    instance: str
    num_operators: int
    base_cost_ns: int
    budget: float
    budget_bytes: int
    solver: str
    status: str
    bound_scope: BoundScope | None = None
    global_bound_ns: int | None = None
    peak_bytes: int | None = None
    solve_s: float | None = None
    moments: tuple[Moment, ...] = ()
    error: str = ""

    @property
    def cost_ns(self) -> int | None:
        return self.moments[-1].cost_ns if self.moments else None

    @property
    def bound_ns(self) -> int | None:
        return self.moments[-1].bound_ns if self.moments else None

    @property
    def gap(self) -> float:
        return self.moments[-1].gap if self.moments else math.inf

    @property
    def first_s(self) -> float | None:
        """When it had its first schedule."""
        return self._first(lambda moment: moment.cost_ns is not None)

    def within_s(self, best_ns: int | None, share: float = 0.01) -> float | None:
        """When its schedule took at most ``1 + share`` times ``best_ns``."""
        if best_ns is None:
            return None
        most_ns = (1 + share) * best_ns
        return self._first(lambda m: m.cost_ns is not None and m.cost_ns <= most_ns)

    def gap_s(self, gap: float) -> float | None:
        """When its own bound was this close to its schedule."""
        return self._first(lambda moment: moment.gap <= gap)

    @property
    def proof_s(self) -> float | None:
        """When it had proven its schedule to 0.01 %, or that nothing fits."""
        return self.solve_s if self.status == "infeasible" else self.gap_s(OPTIMAL_GAP)

    def overhead(self, cost_ns: int | None) -> float | None:
        """``cost_ns`` beyond the step that recomputes nothing, as a share of that step."""
        if cost_ns is None or self.base_cost_ns == 0:
            return None
        return cost_ns / self.base_cost_ns - 1

    def _first(self, reached: Callable[[Moment], bool]) -> float | None:
        return next((m.elapsed_s for m in self.moments if reached(m)), None)


def gap_of(cost_ns: int | None, bound_ns: int | None) -> float:
    """``(cost - bound) / bound``, on the time of the whole step."""
    if cost_ns is None or bound_ns is None:
        return math.inf
    if bound_ns <= 0:
        return 0.0 if cost_ns == 0 else math.inf
    return max(0.0, (cost_ns - bound_ns) / bound_ns)


def run(
    instance: Instance,
    budget: float,
    solver: str,
    *,
    limit_s: float,
    seed: int = 0,
    workers: int = 2,
) -> Run:
    """Solve in a fresh process and wait for it; the row reports its failures."""
    budget_bytes = budget_of(instance.graph, budget)
    row = Run(
        instance=instance.name,
        num_operators=instance.graph.num_operators,
        base_cost_ns=instance.graph.base_cost_ns,
        budget=budget,
        budget_bytes=budget_bytes,
        solver=solver,
        status="broken",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.json"
        path.write_text(instance.graph.to_json(), encoding="utf-8")
        out, err = Path(folder) / "out", Path(folder) / "err"
        with out.open("w") as stdout, err.open("w") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker"]
                + [str(a) for a in (path, budget_bytes, solver, limit_s, seed, workers)],
                cwd=ROOT,
                stdout=stdout,
                stderr=stderr,
                text=True,
            )
            hung = not _ends(child, START_S + 1.5 * limit_s)
        row = heard(row, out.read_text(encoding="utf-8"))
        if row.status != "broken":
            return row
        words = err.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = f"did not end in {START_S + 1.5 * limit_s:.0f} s" if hung else f"{child.returncode}"
    return replace(row, error=": ".join([reason, *words[-1:]]))


def _ends(child: subprocess.Popen[str], limit_s: float) -> bool:
    """Whether the child ended by itself; if not, it is stopped."""
    try:
        child.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return False
    finally:
        child.kill()
        child.wait()
    return True


def heard(row: Run, output: str) -> Run:
    """``row`` with a worker's output; without a result it stays broken."""
    moments: list[Moment] = []
    for line in output.splitlines():
        if not line.endswith("}"):
            continue  # a line cut off while it was written
        said = json.loads(line)
        if "result" not in said:
            moments.append(Moment(**said))
            continue
        result = said["result"]
        moments.append(
            Moment(
                elapsed_s=result["solve_s"], cost_ns=result["cost_ns"], bound_ns=result["bound_ns"]
            )
        )
        row = replace(
            row,
            status=result["status"],
            bound_scope=BoundScope(result["bound_scope"]),
            global_bound_ns=result["global_bound_ns"],
            peak_bytes=result["peak_bytes"],
            solve_s=result["solve_s"],
        )
    return replace(row, moments=tuple(moments))


def as_record(row: Run, best_ns: int | None) -> dict[str, Any]:
    """One line of the table: plain figures, empty where there is none."""
    return {
        **{key: value for key, value in asdict(row).items() if key not in ("moments", "error")},
        "cost_ns": row.cost_ns,
        "bound_ns": row.bound_ns,
        "first_s": row.first_s,
        "within_1_percent_s": row.within_s(best_ns),
        "proof_s": row.proof_s,
        "overhead_percent": _percent(row.overhead(row.cost_ns)),
        "bound_percent": _percent(row.overhead(row.bound_ns)),
        "gap_percent": _percent(row.gap if math.isfinite(row.gap) else None),
        "error": row.error,
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def best_costs(runs: list[Run]) -> dict[tuple[str, float], int]:
    """The cheapest schedule that any solver found, by instance and budget."""
    best: dict[tuple[str, float], int] = {}
    for row in runs:
        if row.cost_ns is not None:
            key = (row.instance, row.budget)
            best[key] = min(best.get(key, row.cost_ns), row.cost_ns)
    return best
