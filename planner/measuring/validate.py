"""Run real steps under a plan and compare their measurements with its predictions.

Two steps run in turn on the same model, the planned and the unplanned one; see
``planner/base/training_step.py`` for what a step is and ``planner/measuring/measure.py`` for
how its peak is recorded. Model, gradients, buffers, optimizer state, random generators
and the applied plan are restored afterwards.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graph_capture.calls.call_spec import bind_call, split_sample
from graph_capture.recording.outputs import take_apart

from ..base.data_parallel import inside
from ..base.forward_slot import Forwards, forward_set, forwards_set, own_forward
from ..base.live_state import LiveState
from ..base.preserve_state import preserve_state
from ..base.resident import (
    gradients_of,
    resident_bytes_by_category,
    resident_tensors,
    single_device,
    storage_bytes,
)
from ..base.training_step import (
    LossFn,
    Sample,
    build_optimizer,
    clear_gradients,
    output_tensors,
)
from ..plan_record import PlanRecord
from ..running.attach import captured_plan
from ..running.compiled_calls import CompiledCalls, PlanCompiler
from ..running.out_of_memory import is_out_of_memory
from ..running.planned_forward import PlannedForward
from .bit_comparison import Results, Verdict, compare_bits, step_results
from .loss_and_optimizer import (
    planned_loss_fn,
    planned_optimizer,
)
from .measure import measure_pair, record_peak, timed_us
from .rounding import compare_rounded
from .trial import Taken, Trial
from .validation import Validation
from .validation_report import reported

_WARMUP_PAIRS = 2


def validate_plan(
    plan: PlanRecord,
    live: LiveState | None,
    model: nn.Module,
    sample_input: Sample,
    *,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    repeats: int = 10,
    unplanned: bool = True,
    bits: bool = True,
    seed: int = 0,
    compiler: PlanCompiler | None = None,
) -> Validation:
    """See :meth:`planner.Plan.validate`.

    Parameters
    ----------
    compiler
        Compiles what it can of the plan's graphs; ``None`` runs eager kernels.
    """
    model = inside(model)
    check_trial(model, sample_input, repeats)
    own = own_forward(model)
    with forward_set(model, own):
        plan, live, captured = captured_plan(plan, live, model)
        planned = PlannedForward(model, plan, live, captured, compiler=compiler)
        planned.check(bind_call(model.forward, *split_sample(sample_input)))
    request = None if live is None else live.request
    return validate_step(
        plan,
        model,
        sample_input,
        planned=((model, planned),),
        own=((model, own),),
        loss_fn=planned_loss_fn(plan, loss_fn, None if request is None else request.loss_fn),
        optimizer=optimizer,
        repeats=repeats,
        unplanned=unplanned,
        bits=bits,
        seed=seed,
    )


def check_trial(model: nn.Module, sample_input: Sample, repeats: int) -> None:
    """Refuse what no step can be run with.

    Raises
    ------
    ValueError
        In eval mode, with tensors on several devices, or without a number of repeats.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0:
        raise ValueError(f"repeats must be a whole number from 0 on, got {repeats!r}")
    if not model.training:
        raise ValueError("the model is in eval mode, where no plan runs: call model.train()")
    single_device(model, sample_input)


def validate_step(
    plan: PlanRecord,
    model: nn.Module,
    sample_input: Sample,
    *,
    planned: Forwards,
    own: Forwards,
    loss_fn: LossFn | None,
    optimizer: torch.optim.Optimizer | str | None,
    repeats: int,
    unplanned: bool,
    bits: bool,
    seed: int,
) -> Validation:
    """Hold a plan to its word, given the forwards with which a step runs by it.

    The trial has been checked (:func:`check_trial`).

    Parameters
    ----------
    planned, own
        Forwards of the same modules, with the plan and without.
    """
    trial = Trial(
        model=model,
        sample_input=sample_input,
        loss_fn=loss_fn,
        seed=seed,
        device=single_device(model, sample_input),
        holds=plan.holds,
    )
    with forwards_set(own):
        chosen = planned_optimizer(plan, model, optimizer)
        with preserve_state(model, sample_input, trial.loss_fn, chosen):
            if isinstance(chosen, str):
                chosen = build_optimizer(chosen, model.parameters())
            found = Verdict(bits="not compared")
            note = None if unplanned else "not run: unplanned=False"
            if bits and unplanned:
                found, note = _compare(trial, planned, own)
            taken = _record(trial, planned, chosen)
            without: Taken | None = None
            if note is None:
                without, note = _unless_out_of_memory(trial, lambda: _record(trial, own, chosen))
            timing: tuple[list[float], list[float]] = ([], [])
            if repeats:
                timing = _time(trial, planned, own if without else None, chosen, repeats)
    return reported(plan, trial, taken, without, timing, found, note, _compiled_of(planned))


def _compiled_of(planned: Forwards) -> CompiledCalls | None:
    """What of the steps is compiled; ``None`` where nothing was to be."""
    found = [f.compiled for _, f in planned if isinstance(f, PlannedForward) and f.compiled]
    return sum(found, CompiledCalls()) if found else None


def _record(trial: Trial, forwards: Forwards, optimizer: torch.optim.Optimizer | None) -> Taken:
    """The peak of a step, after a first one has built what is built lazily."""
    model, sample_input, loss_fn = trial.model, trial.sample_input, trial.loss_fn
    step = trial.step(optimizer)
    seen: list[int] = []

    def recorded() -> Any:
        output, loss = step()
        held = output if output is not None or loss_fn is not None else loss
        gradients = [] if trial.holds.in_buckets else gradients_of(model)
        gradients += [
            t.grad
            for t in output_tensors(sample_input)
            if t.is_leaf and t.requires_grad and t.grad is not None
        ]
        there = [*model.parameters(), *model.buffers(), *output_tensors(sample_input)]
        seen.append(storage_bytes(gradients, trial.device))
        both = storage_bytes([*there, *take_apart(held)[1]], trial.device)
        seen.append(both - storage_bytes(there, trial.device))
        return output, loss

    with forwards_set(forwards):
        step()
        keeps = trial.holds.keeps_gradients
        clear_gradients(model, sample_input, loss_fn, set_to_none=not keeps)
        resident = resident_bytes_by_category(
            model, sample_input, trial.device, loss_fn=loss_fn, optimizer=optimizer
        )
        resident["resident"] = trial.holds.resident_bytes
        resident["bucket"] = trial.bucket_bytes()
        held = resident_tensors(model, sample_input, loss_fn=loss_fn, optimizer=optimizer)
        earlier_gradient_bytes = 0  # parts of buckets are counted with these
        if not trial.holds.in_buckets:
            earlier_gradient_bytes = storage_bytes(gradients_of(model), trial.device)
        held += gradients_of(model)
        extra_bytes, reserved_bytes = record_peak(recorded, trial.device, held)
        clear_gradients(model, sample_input, loss_fn)
    return Taken(
        resident_bytes=resident,
        extra_bytes=extra_bytes,
        reserved_bytes=reserved_bytes,
        gradient_bytes=seen[0],
        output_bytes=seen[1],
        earlier_gradient_bytes=earlier_gradient_bytes,
    )


def _time(
    trial: Trial,
    planned: Forwards,
    other: Forwards | None,
    optimizer: torch.optim.Optimizer | None,
    repeats: int,
) -> tuple[list[float], list[float]]:
    """Microseconds of unplanned and of planned steps; only planned ones without ``other``."""
    step = trial.step(optimizer)

    def run(forwards: Forwards) -> Any:
        with forwards_set(forwards):
            return step()

    if other is None:
        for _ in range(_WARMUP_PAIRS):
            run(planned)
        return [], [timed_us(lambda: run(planned), trial.device) for _ in range(repeats)]
    pairs = measure_pair(
        lambda: run(other),
        lambda: run(planned),
        repeats=repeats,
        warmup=_WARMUP_PAIRS,
        device=trial.device,
    )
    return list(pairs.first_us), list(pairs.second_us)


class _UnplannedRanOut(Exception):
    """The unplanned step ran out of memory."""


def _compare(trial: Trial, planned: Forwards, own: Forwards) -> tuple[Verdict, str | None]:
    """The verdict on the bits, and why the unplanned step could not run.

    Compiled kernels round otherwise than eager's: then results may differ by rounding. If the
    planned step runs out of memory, its error is raised.
    """
    note: str | None = None

    def run(forwards: Forwards) -> Results:
        with forwards_set(forwards):
            return step_results(
                trial.model,
                trial.sample_input,
                trial.loss_fn,
                trial.seed,
                accumulates=trial.holds.accumulates,
                num_calls=trial.holds.concurrent_calls,
                consumes=trial.holds.consumes,
            )

    def unplanned() -> Results:
        nonlocal note
        results, note = _unless_out_of_memory(trial, lambda: run(own))
        if results is None:
            raise _UnplannedRanOut
        return results

    compiles = any(isinstance(f, PlannedForward) and f.compiler for _, f in planned)
    try:
        if compiles:
            return compare_rounded(trial.model, trial.device, unplanned, lambda: run(planned)), None
        return compare_bits(unplanned, lambda: run(planned)), None
    except _UnplannedRanOut:
        return Verdict(bits="not compared"), note


# -- the unplanned step may not fit ----------------------------------------------------


def _unless_out_of_memory(trial: Trial, call: Callable[[], Any]) -> tuple[Any | None, str | None]:
    """The result of a call that runs the unplanned step, or why it could not run."""
    failed = False
    result = None
    with _clean_after(trial):
        try:
            result = call()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = True
    note = "ran out of memory, which the planned step did not" if failed else None
    return result, note


@contextmanager
def _clean_after(trial: Trial) -> Iterator[None]:
    """Drop what a failed step has left on the device."""
    yield
    clear_gradients(trial.model, trial.sample_input, trial.loss_fn)
    gc.collect()
    if trial.device.type == "cuda":
        torch.cuda.empty_cache()
