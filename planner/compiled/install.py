"""Budgets for ``torch.compile(model)`` as it stands, in trainers as well."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from graph_capture.private_torch.compiled_calls import entering_calls
from graph_capture.private_torch.inductor import (
    compiling_by,
    custom_partitioner,
    partitioning_by,
)

from ..errors import PlanWarning
from .compiled_plan import CompiledPlan
from .options import CompiledOptions
from .partition import Partitioner
from .step_so_far import StepSoFar
from .unplanned_calls import UNPLANNED, UnplannedCalls


@contextmanager
def install(**options: Any) -> Iterator[list[CompiledPlan]]:
    """Within the block, whatever Inductor compiles stays within a byte budget.

    For ``torch.compile(model)`` with its own backend, and for trainers that call it
    (``TrainingArguments(torch_compile=True)``). What was compiled before is not compiled
    again.

    Parameters
    ----------
    options
        As for backend ``"remat"``, ``budget_gb=40`` for instance; ``lower`` is Inductor.

    Yields
    ------
    list
        The plans of the graphs that were compiled in the block so far.

    Raises
    ------
    ValueError
        When an option is invalid.

    Warns
    -----
    PlanWarning
        When a training step, or a part of it, runs by no plan; at the end of the block, when
        nothing was planned in it.
    """
    if options.get("lower", "inductor") != "inductor":
        raise ValueError(
            f"install() is for Inductor, got lower={options['lower']!r}: use "
            "torch.compile(model, backend='remat', options={'lower': …})"
        )
    plans: list[CompiledPlan] = []
    told = options.get("on_plan")

    def on_plan(plan: CompiledPlan) -> None:
        plans.append(plan)
        if told is not None:
            told(plan)

    read = CompiledOptions.of({**options, "lower": "inductor", "on_plan": on_plan})
    partition = Partitioner(read, so_far=StepSoFar())

    def compile_graph(
        compile_fx: Callable[..., Any], module: Any, inputs: Sequence[Any], *args: Any, **named: Any
    ) -> Callable[..., Any]:
        return partition.compiled(lambda: compile_fx(module, inputs, *args, **named), inputs)

    calls = UnplannedCalls()
    with (
        entering_calls("inductor", calls.call),
        compiling_by(compile_graph),
        partitioning_by(custom_partitioner(partition, read.name)),
    ):
        yield plans
    if not plans and UNPLANNED not in calls.said:
        warnings.warn(NOTHING_PLANNED, PlanWarning, stacklevel=3)


NOTHING_PLANNED = (
    "nothing was planned: no graph with gradients was compiled within install(), so no budget "
    "holds. Dynamo may have given up on the function and run it as plain Python (nn.LSTM, for "
    "instance; TORCH_LOGS=graph_breaks says why), it was compiled before the block "
    "(torch.compiler.reset() forgets that), or it ran under torch.no_grad()"
)


__all__ = ["NOTHING_PLANNED", "install"]
