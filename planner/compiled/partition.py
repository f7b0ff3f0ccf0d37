"""The partition function: from a joint graph to forward and backward within the budget."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node

from solvers.replay import replay

from ..base.budget import parse_headroom
from ..errors import PlanWarning
from .compiled_plan import CompiledPlan
from .emit import emit
from .joint_step import JointStep, read_joint_step, tensors_of
from .options import CompiledOptions
from .priced_step import price_step, unplanned_peak_bytes, without_unused_states
from .sizes import plan_for_largest
from .solve_step import solve_step

logger = logging.getLogger(__name__)


class Partitioner:
    """Splits joint graphs within a budget; called by AOTAutograd.

    Parameters
    ----------
    options
        Budget and more.
    goes_on
        Whether an input of the graph comes from another graph; ``None`` if only the graph
        itself can show it, by an input beside the parameters that gets a gradient.
    """

    def __init__(self, options: CompiledOptions, *, goes_on: bool | None = None) -> None:
        self._options = options
        self._goes_on = goes_on

    def __call__(
        self,
        module: GraphModule,
        joint_inputs: Sequence[Any],
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **_others: Any,
    ) -> tuple[GraphModule, GraphModule]:
        options = self._options
        step = read_joint_step(module, num_fwd_outputs)
        static = frozenset(static_lifetime_input_indices or ())
        goes_on = self._goes_on
        if goes_on is None:
            goes_on = any(
                isinstance(g, Node) and i not in static for i, g in enumerate(step.gradients)
            )
        _warn_of_parts(step, goes_on)
        plan_for_largest(step)
        priced = price_step(step, resident_bytes=options.resident_bytes)
        budget = parse_headroom(options.headroom, options.budget_bytes, priced.device.type)
        result = solve_step(priced, budget, options.solving)
        assert result.schedule is not None
        graph = without_unused_states(priced, result.schedule)
        plan = CompiledPlan(
            graph=graph,
            schedule=result.schedule,
            turn=priced.turn,
            lower=options.lower,
            budget_bytes=options.budget_bytes,
            headroom_bytes=budget.headroom_bytes,
            predicted_peak_bytes=replay(graph, result.schedule).peak_bytes,
            unplanned_peak_bytes=unplanned_peak_bytes(priced),
            lower_bound_ns=result.lower_bound_ns,
            status=result.status,
            solve_s=result.solve_s,
        )
        logger.info("%s", plan)
        if options.on_plan is not None:
            options.on_plan(plan)
        return emit(priced, result.schedule)


PART_OF_A_STEP = (
    "a compiled graph is only a part of the training step: the loss is computed outside of it, or "
    "another graph comes before it (a graph break). Its plan counts neither their memory nor "
    "their time, so the bound and the budget hold for each graph alone. Compile the model with its "
    "loss and without graph breaks (fullgraph=True shows them), or say what else there is by "
    "resident_bytes="
)


def _warn_of_parts(step: JointStep, goes_on: bool) -> None:
    has_loss = any(t.numel() <= 1 for n in step.tangents for t in tensors_of(n.meta["val"]))
    if not has_loss or goes_on:
        warnings.warn(PART_OF_A_STEP, PlanWarning, stacklevel=2)


__all__ = ["PART_OF_A_STEP", "Partitioner"]
