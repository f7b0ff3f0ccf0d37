"""The compiled steps of a comparison: what they are asked for with, and their record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from graph_capture.loop.loop_holds import LoopHolds

from ...base.forward_slot import forward_set, own_forward
from ...base.preserve_state import preserve_state
from ...base.resident import single_device
from ...base.solve_options import SolveOptions
from ...base.step_spec import StepSpec
from ...comparison_record import ComparisonRecord
from ...compiled.options import Lower
from ...compiled_record import CompiledRecord, CompiledRow
from ..compiled_runs import run_compiled
from .run_peer import peers_warnings, release
from .runner import Execution, said


def check_compiled(spec: StepSpec) -> None:
    """Refuse a step whose compiled rows would not be of the same loop, or could not be planned.

    Raises
    ------
    ValueError
        Says which argument is in the way.
    """
    holds = spec.holds
    if replace(holds, resident_bytes=0) != LoopHolds():
        words = ", ".join(replace(holds, resident_bytes=0).words)
        raise ValueError(
            "compiled steps are run in a loop that holds outputs, and other tensors by "
            f"resident_bytes, and this one has: {words}. Leave compiled_ratios out, or these"
        )
    device = single_device(spec.model, spec.sample_input)
    if device.type != "cpu":
        raise ValueError(
            f"compiled steps are compared on the CPU, and the model lies on {device}: the code "
            "that Inductor generates is read before it runs, which is done on the CPU only. "
            "Leave compiled_ratios out"
        )


def with_compiled(
    comparison: ComparisonRecord,
    execution: Execution,
    ratios: Sequence[float],
    lower: Lower,
    options: SolveOptions,
    tell: Callable[[str], None],
) -> ComparisonRecord:
    """Return the comparison with the compiled steps; what fails is told in its row.

    All state is restored afterwards. A plan applied to the model is left out.
    """
    spec, name = execution.spec, comparison.model
    state = preserve_state(spec.model, spec.sample_input, spec.loss_fn, spec.optimizer)
    with forward_set(spec.model, own_forward(spec.model)), state, peers_warnings():
        try:
            found = run_compiled(
                spec.model,
                spec.sample_input,
                ratios=ratios,
                loss_fn=spec.loss_fn,
                optimizer=spec.optimizer,
                lower=lower,
                repeats=execution.repeats,
                seed=execution.seed,
                resident_bytes=spec.holds.resident_bytes,
                search={
                    "time_limit_s": options.time_limit_s,
                    "gap": options.gap,
                    "seed": options.seed,
                    "workers": options.workers,
                },
                name=name,
                on_begin=tell,
            )
        # A compiler may fail in any way: the row of the step without a budget reports it.
        except Exception as error:  # noqa: BLE001
            row = CompiledRow(kind="unbudgeted", failure=said(error, "when it was compiled"))
            found = CompiledRecord(name=name, lower=lower, rows=(row,))
    release(execution.device)
    return replace(comparison, compiled=found)


__all__ = ["check_compiled", "with_compiled"]
