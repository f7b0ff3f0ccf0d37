"""Run a peer alongside eager: its peak, paired times, and whether its steps are right."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graph_capture.costs.resolve import CostModelChoice
from graph_capture.loop.loop_holds import NOTHING_ELSE, LoopHolds

from ...base.forward_slot import forward_set, own_forward
from ...base.preserve_state import preserve_state
from ...base.resident import single_device
from ...base.training_step import (
    LossFn,
    Sample,
    build_optimizer,
    make_step,
    train_step,
)
from ...comparison_record import (
    ComparisonRow,
    MeasuredStep,
    RowOutcome,
)
from ...measuring.measure import (
    measure,
    measure_pair,
    timed_us,
)
from ...measuring.rounding import StepVerdict
from ...running.out_of_memory import is_out_of_memory
from ..peers.peer import (
    PEER_ERRORS,
    Peer,
    Situation,
    blocks_of,
)
from .runner import measured_step, outcome_of
from .step_verdict import judge_steps

Optimizer = torch.optim.Optimizer | str | None


def run_peer(
    peer: Peer,
    model: nn.Module,
    sample_input: Sample,
    *,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    repeats: int = 8,
    seed: int = 0,
    num_seeds: int = 2,
    blocks: tuple[str, ...] | None = None,
    holds: LoopHolds = NOTHING_ELSE,
    budget_bytes: int | None = None,
    beside_bytes: int = 0,
    cost_model: CostModelChoice = "roofline",
) -> ComparisonRow:
    """Execute a peer on a copy of a model, alongside the model's own steps.

    The model is never changed: the peer works on a deep copy. On a card this is one more
    set of weights (and of the optimizer's state, if an instance is given). It is in no
    measured peak, but must fit. Parameters, buffers, gradients, optimizer, inputs and
    random generators are restored afterwards. A plan applied to the model is left out.
    Under autocast, call this under it.

    Parameters
    ----------
    peer
        One of :data:`planner.comparing.peers.PEERS`, or another.
    model
        In training mode, on one device.
    sample_input, loss_fn
        As for :func:`planner.measure`. A ``loss_fn`` that reads the model reads the
        given model, not the copy.
    optimizer
        An instance for the model, or a name; it counts in peak and times, as in a whole
        step.
    repeats
        Pairs of timed steps, rounded up to an even number; 0 gives NaN in the time figures.
    seed, num_seeds
        The seed of each measured step. Steps are compared with eager's from this seed
        and the following ones.
    blocks
        Paths of the model's blocks in the order in which they run; ``None`` captures
        the step to find those that the strategies divide.
    holds
        What the loop around the step holds.
    budget_bytes, beside_bytes, cost_model
        For a peer that works towards a budget, see :class:`~planner.comparing.peers.Situation`.

    Returns
    -------
    ComparisonRow
        With measured figures; ``solve_s`` is the wall-clock time of preparing and of the
        first step, in which compilers compile. Or with ``error``, if the peer failed
        with one of :data:`PEER_ERRORS`.

    Raises
    ------
    ValueError
        When the model lies on several devices, or on one that cannot be measured.
    """
    device = single_device(model, sample_input)

    def known_blocks() -> tuple[str, ...]:
        return blocks_of(model, sample_input, loss_fn) if blocks is None else blocks

    situation = Situation(
        sample_input=sample_input,
        loss_fn=loss_fn,
        device=device,
        blocks=known_blocks,
        budget_bytes=budget_bytes,
        beside_bytes=beside_bytes,
        cost_model=cost_model,
    )
    seeds = range(seed, seed + num_seeds)
    try:
        return _row(peer, model, situation, optimizer, repeats, seeds, holds)
    finally:
        # Here nobody holds the peer's models any more.
        release(device)


def _row(
    peer: Peer,
    model: nn.Module,
    situation: Situation,
    optimizer: Optimizer,
    repeats: int,
    seeds: range,
    holds: LoopHolds,
) -> ComparisonRow:
    """A peer's row; every model made for it is freed when this call ends."""
    sample_input, loss_fn = situation.sample_input, situation.loss_fn
    row = ComparisonRow(strategy=peer.name, kind="peer", budget_bytes=situation.budget_bytes)
    begin_s = time.monotonic()
    with forward_set(model, own_forward(model)), peers_warnings():
        try:
            twin, twins_optimizer = copies(model, optimizer)
            with peer.prepare(twin, situation) as ready:
                _one_step(ready.model, sample_input, loss_fn, seeds.start)
                row = replace(
                    row,
                    setting=ready.setting,
                    note=ready.note,
                    solve_s=time.monotonic() - begin_s,
                )
                sides = ((model, optimizer), (ready.model, twins_optimizer))
                measured = _measured(
                    sides, sample_input, loss_fn, repeats, seeds, situation.device, holds
                )
                limit_bytes = situation.budget_bytes
                over = limit_bytes is not None and measured.peak_bytes > limit_bytes
                outcome = RowOutcome.OVER_BUDGET if over else row.outcome
                return replace(row, measured=measured, outcome=outcome)
        except PEER_ERRORS as error:
            return replace(row, error=error_text(error), outcome=outcome_of(error))


@contextmanager
def peers_warnings() -> Iterator[None]:
    """Suppress the warnings of compilers and other tools during a comparison."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def error_text(error: BaseException) -> str:
    """Return the type and first line of an error."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:300]


def release(device: torch.device) -> None:
    """Free unused memory, so that the next figure starts from a clean allocator."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def copies(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Copy a model and its optimizer together, without gradients."""
    memo: dict[int, Any] = {}
    # The model's gradients belong to the loop: they are neither copied nor measured.
    gradients = [(p, p.grad) for p in model.parameters()]
    for p, _ in gradients:
        p.grad = None
    try:
        twin = copy.deepcopy(model, memo)
        return twin, copy.deepcopy(optimizer, memo)
    finally:
        for p, gradient in gradients:
            p.grad = gradient


def _one_step(model: nn.Module, sample_input: Sample, loss_fn: LossFn | None, seed: int) -> None:
    with preserve_state(model, sample_input, loss_fn, None):
        torch.manual_seed(seed)
        train_step(model, sample_input, loss_fn)


def _eager_runs(
    model: nn.Module, sample_input: Sample, loss_fn: LossFn | None, device: torch.device
) -> bool:
    """Whether eager's step fits into memory."""
    try:
        _one_step(model, sample_input, loss_fn, 0)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    release(device)
    return False


def _measured(
    sides: tuple[tuple[nn.Module, Optimizer], tuple[nn.Module, Optimizer]],
    sample_input: Sample,
    loss_fn: LossFn | None,
    repeats: int,
    seeds: range,
    device: torch.device,
    holds: LoopHolds,
) -> MeasuredStep:
    (eager, _), (other, others_optimizer) = sides
    verdict: StepVerdict | None = None
    if _eager_runs(eager, sample_input, loss_fn, device):
        verdict = judge_steps(eager, other, sample_input, loss_fn=loss_fn, seeds=seeds)
    release(device)
    peak_bytes = measure(
        other,
        sample_input,
        loss_fn=loss_fn,
        optimizer=others_optimizer,
        repeats=0,
        seed=seeds.start,
        outputs=holds.outputs,
        grads=holds.grads,
        resident_bytes=holds.resident_bytes,
        distributed=holds.distributed,
    ).peak_bytes
    beside = sides if verdict is not None else sides[1:]
    return measured_step(
        peak_bytes,
        paired_times(beside, sample_input, loss_fn, repeats, seeds.start, device, holds),
        "not compared" if verdict is None else verdict.bits,
        "eager runs out of memory" if verdict is None else verdict.difference,
    )


def paired_times(
    sides: tuple[tuple[nn.Module, Optimizer], ...],
    sample_input: Sample,
    loss_fn: LossFn | None,
    repeats: int,
    seed: int,
    device: torch.device,
    holds: LoopHolds,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Microseconds of eager's and of the other's steps; only the other's if eager is left out."""
    if not repeats:
        return (), ()
    if len(sides) == 2:
        (eager, eagers), (other, others) = sides
        with (
            preserve_state(eager, sample_input, loss_fn, eagers),
            preserve_state(other, sample_input, loss_fn, others),
        ):
            first, second = (
                make_step(
                    m,
                    sample_input,
                    loss_fn=loss_fn,
                    optimizer=_built(o, m),
                    seed=seed,
                    holds=holds,
                )
                for m, o in sides
            )
            pairs = measure_pair(first, second, repeats=repeats, device=device)
        return pairs.first_us, pairs.second_us
    ((other, others),) = sides
    with preserve_state(other, sample_input, loss_fn, others):
        step = make_step(
            other,
            sample_input,
            loss_fn=loss_fn,
            optimizer=_built(others, other),
            seed=seed,
            holds=holds,
        )
        for _ in range(2):
            step()
        return (), tuple(timed_us(step, device) for _ in range(repeats))


def _built(optimizer: Optimizer, model: nn.Module) -> torch.optim.Optimizer | None:
    if isinstance(optimizer, str):
        return build_optimizer(optimizer, model.parameters())
    return optimizer
