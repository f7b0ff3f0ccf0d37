"""The backend ``"remat"`` of ``torch.compile``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from torch.fx import GraphModule

from graph_capture.private_torch.compiled_calls import enter_calls
from graph_capture.private_torch.compiler import (
    aot_autograd,
    differentiates_inside,
    register_backend,
    takes_boxed,
)
from graph_capture.private_torch.inductor import (
    compile_by_inductor,
    custom_partitioner,
    partitioning_by,
)

from ..errors import PlanWarning
from ..running.rewrite import BoxedCodeGen
from .options import CompiledOptions
from .partition import Partitioner
from .step_so_far import StepSoFar
from .unplanned_calls import UnplannedCalls


def remat(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's so that its training step stays within a byte budget.

    Called by ``torch.compile(model, backend="remat", options={"budget_gb": 40})``; see
    :class:`~planner.compiled.options.CompiledOptions` for the options.

    Raises
    ------
    ValueError
        When an option is invalid.
    InfeasibleBudgetError
        When no schedule fits; the message says the least budget that would.

    Warns
    -----
    PlanWarning
        When the graph computes gradients itself, and so nothing is planned.
    """
    if mode not in (None, "default"):
        raise ValueError(
            f"backend 'remat' takes no mode, got {mode!r}: pass options={{'budget_gb': …}}"
        )
    read = CompiledOptions.of(options)
    partition = Partitioner(read, so_far=_so_far(options))
    within = differentiates_inside(module)
    compiled = partition.compiled(lambda: _compiled(partition, read, module, inputs), inputs)
    if within and not partition.was_asked:
        warnings.warn(GRADIENTS_WITHIN, PlanWarning, stacklevel=2)
    return compiled


def _compiled(
    partition: Partitioner, read: CompiledOptions, module: GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    made: Callable[..., Any]
    if read.lower == "aot_eager":
        made = _with_eager_kernels(partition)(module, inputs)
    else:
        with partitioning_by(custom_partitioner(partition, read.name)):
            made = compile_by_inductor(module, inputs)
    return made


GRADIENTS_WITHIN = (
    "nothing is planned, and no budget holds: the compiled function computes its gradients itself "
    "(torch.func.grad), so that PyTorch has one graph and nothing to split. Compile the loss, and "
    "call backward() outside of it"
)


_MOST_STEPS = 8

_steps: list[tuple[Any, StepSoFar]] = []  # by the options of a torch.compile, the last one last


def _so_far(options: Any) -> StepSoFar:
    """The graphs that the same ``torch.compile`` has compiled, which passes the same options."""
    for given, so_far in _steps:
        if given is options:
            return so_far
    _steps.append((options, StepSoFar()))
    del _steps[:-_MOST_STEPS]
    return _steps[-1][1]


def _with_eager_kernels(partition: Partitioner) -> Any:
    return aot_autograd(
        fw_compiler=_boxed,
        bw_compiler=_boxed,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )


def _boxed(module: GraphModule, inputs: Sequence[Any]) -> Any:
    """Run a graph call by call; it takes one list, empties it, and frees at last uses."""
    module.graph.set_codegen(BoxedCodeGen())
    module.recompile()

    def run(boxed: list[Any]) -> Any:
        return module.forward(boxed)

    return takes_boxed(run)


enter_calls(remat, lambda: UnplannedCalls().call)  # also where PyTorch loads it by its entry point


def register() -> None:
    """Make ``torch.compile(backend="remat")`` known to PyTorch, where no installed package does.

    PyTorch looks for entry points itself, once a backend is asked for. Telling it of one loads
    its compiler, which takes more than a second.
    """
    if "remat" not in entry_points(group="torch_dynamo_backends").names:
        register_backend(remat, "remat")


__all__ = ["GRADIENTS_WITHIN", "register", "remat"]
