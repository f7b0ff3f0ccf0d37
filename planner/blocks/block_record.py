"""The decision for a step in blocks: the whole step's record, and one for each kind of block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from graph_capture.cost_graph import Operator

from ..errors import PlanError
from ..plan_record import PlanRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeStep:
    """What a plan of the whole step, across its blocks, would take.

    Parameters
    ----------
    step_us
        Of the best schedule that was found; ``None`` where none was.
    lower_bound_us
        No schedule whose first runs keep eager's order takes less time.
    """

    step_us: float | None
    lower_bound_us: float


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """Which module runs by which plan.

    Parameters
    ----------
    plans
        The distinct plans. Their figures are those of a block alone.
    plan_of
        For each block's path the index of its plan.
    measured
        Whether the rest of the step was run for real instead of being captured.
    whole
        What a plan of the whole step would take, where that is known.
    """

    plans: tuple[PlanRecord, ...]
    plan_of: Mapping[str, int]
    measured: bool = False
    whole: WholeStep | None = None

    def of(self, path: str) -> PlanRecord:
        """Return the plan of a block."""
        return self.plans[self.plan_of[path]]

    def alike(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """The plans, and the blocks that run by each."""
        for i in range(len(self.plans)):
            yield i, tuple(path for path, j in self.plan_of.items() if j == i)


def check_parts(step: PlanRecord, parts: BlockParts) -> None:
    """Check that a step's record is made of its blocks' plans.

    Raises
    ------
    PlanError
        Names the first block that does not fit.
    """
    at = {op.name: v for v, op in enumerate(step.graph.operators)}
    covered: Counter[int] = Counter()
    for path in parts.plan_of:
        part = parts.of(path)
        ours = {f"{path}/{op.name}": op for op in part.graph.operators if op.phase != "loss"}
        missing = next((name for name in ours if name not in at), None)
        if missing is not None:
            raise PlanError(f"the step has no operator {missing!r:.200} of block {path!r:.100}")
        for name, op in ours.items():
            if not _is_same(step.graph.operators[at[name]], op):
                raise PlanError(f"operator {name!r:.200} is another in the step than in its block")
        own = {at[name] for name in ours}
        names = [
            f"{path}/{part.graph.operators[v].name}"
            for v in part.schedule.order
            if part.graph.operators[v].phase != "loss"
        ]
        if [v for v in step.schedule.order if v in own] != [at[name] for name in names]:
            raise PlanError(f"block {path!r:.100} runs otherwise in the step than by its own plan")
        covered.update(own)
    repeated = step.schedule.recomputed()
    outside = next((v for v in repeated if v not in covered), None)
    if outside is not None:
        name = step.graph.operators[outside].name
        raise PlanError(f"operator {name!r:.200} is in no block, and runs again")
    if any(count > 1 for count in covered.values()):
        raise PlanError("an operator belongs to two blocks")


def _is_same(there: Operator, here: Operator) -> bool:
    """Whether an operator of the step is a block's, apart from its place."""

    def bare(op: Operator) -> Operator:
        return replace(
            op,
            name="",
            inputs=(),
            outputs=(),
            workspace_bytes=0,
            module_path="",
            rewrites=(),
        )

    counts = (len(there.outputs), len(there.rewrites)) == (len(here.outputs), len(here.rewrites))
    return counts and bare(there) == bare(here) and there.workspace_bytes >= here.workspace_bytes
