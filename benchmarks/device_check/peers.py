"""Compare what people use today with a plan at the same peak, in one run.

Per-block checkpointing, by Transformers' own switch or by
``torch.utils.checkpoint`` around each block, and ``torch.compile`` with
``torch._functorch.config.activation_memory_budget``, a ratio of saved bytes: the
peers of ``planner.comparing``. If a peer fails, its row has the error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import nn

from planner import InfeasibleBudgetError, measure
from planner.base.training_step import make_step
from planner.comparing.execution.run_peer import (
    error_text,
    peers_warnings,
)
from planner.comparing.execution.step_verdict import judge_steps
from planner.comparing.peers import PEER_ERRORS, PEERS, Peer, Situation, compile_peer
from planner.measuring.measure import measure_pair, quartiles

from .bench import Bench, release
from .overhead import predicted_overhead


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRow:
    """One way to train with less memory.

    Parameters
    ----------
    model
        Name of the subject.
    method
        In words.
    error
        Its error; ``""`` if it did not fail.
    peak_bytes
        Measured, of the whole step, optimizer included.
    ratio
        Time of a step over eager's, without the optimizer: median of pairs.
    quartiles
        Of the same.
    loss_error, gradient_error, gradients, buffers, difference
        Of two steps on the same seed, as in
        :class:`planner.measuring.rounding.StepVerdict`.
    predicted_bytes, predicted_ratio
        Of a plan.
    ratio_to_checkpointing
        Of a plan: its time over checkpointing's, measured in separate pairs.
    """

    model: str
    method: str
    error: str = ""
    peak_bytes: int = 0
    ratio: float = math.nan
    quartiles: tuple[float, float] = (math.nan, math.nan)
    loss_error: float = math.nan
    gradient_error: float = math.nan
    gradients: str = ""
    buffers: str = ""
    difference: str = ""
    predicted_bytes: int | None = None
    predicted_ratio: float | None = None
    ratio_to_checkpointing: float | None = None


def check_peers(
    bench: Bench, *, compile_budgets: tuple[float, ...] = (1.0, 0.5), num_pairs: int = 8
) -> list[PeerRow]:
    """Eager, checkpointing, our plan at the peak of checkpointing, compilation at each budget."""
    rows = [_measured(bench, bench.make(), "eager", 0)]
    rows += _checkpointing_and_plan(bench, num_pairs)
    return rows + [_compiled(bench, budget, num_pairs) for budget in compile_budgets]


def checkpointing_of(model: nn.Module) -> Peer:
    """Per-block checkpointing as users run it: Transformers' own if it accepts the model."""
    supported = getattr(model, "supports_gradient_checkpointing", False)
    return PEERS["gradient_checkpointing_enable" if supported else "checkpoint_per_block"]


# -- rows --------------------------------------------------------------------


def _checkpointing_and_plan(bench: Bench, num_pairs: int) -> list[PeerRow]:
    """Checkpointing, and a plan at its measured peak, timed against each other, too."""
    model = bench.make()
    peer = checkpointing_of(model)
    method = f"per-block checkpointing, by {peer.source}"
    situation = _situation(bench, model)
    with ExitStack() as prepared:
        try:
            with peers_warnings():
                ready = prepared.enter_context(peer.prepare(model, situation))
                del model
                theirs = _measured(bench, ready.model, method, num_pairs)
        except PEER_ERRORS as error:
            return [_failed(bench, method, error)]
        try:
            return [theirs, _plan_at(bench, theirs.peak_bytes, ready.model, num_pairs)]
        finally:
            release(bench.device)


def _plan_at(bench: Bench, peak_bytes: int, checkpointed: nn.Module, num_pairs: int) -> PeerRow:
    """Our own row: a fault here is ours, so nothing but "no plan fits" is caught."""
    method = "plan at the peak of checkpointing"
    try:
        plan = bench.plan(peak_bytes)
    except InfeasibleBudgetError as error:
        return _failed(bench, method, error)
    model = plan.apply(bench.make())
    row = _measured(bench, model, method, num_pairs)
    beside = _ratios(bench, checkpointed, model, num_pairs)
    return replace(
        row,
        predicted_bytes=plan.predicted_peak_bytes,
        predicted_ratio=1 + predicted_overhead(plan, bench.unplanned()),
        ratio_to_checkpointing=statistics.median(beside),
    )


def _compiled(bench: Bench, budget: float, num_pairs: int) -> PeerRow:
    peer = compile_peer(budget)
    model = bench.make()
    method = peer.summary
    try:
        with peers_warnings(), peer.prepare(model, _situation(bench, model)) as ready:
            method = f"torch.compile, {ready.setting}"
            return _measured(bench, ready.model, method, num_pairs)
    except PEER_ERRORS as error:
        return _failed(bench, method, error)
    finally:
        release(bench.device)


def _measured(bench: Bench, model: nn.Module, method: str, num_pairs: int) -> PeerRow:
    subject, sample = bench.subject, bench.sample()
    with bench.context():
        # A new model: timed steps have changed the statistics of the bench's own.
        verdict = judge_steps(bench.make(), model, sample, seeds=(bench.seed,))
        release(bench.device)
        peak_bytes = measure(
            model, sample, optimizer=subject.optimizer, repeats=0, seed=bench.seed
        ).peak_bytes
    ratios = _ratios(bench, bench.model, model, num_pairs) if num_pairs else (1.0, 1.0)
    low, high = quartiles(ratios)
    return PeerRow(
        model=subject.name,
        method=method,
        peak_bytes=peak_bytes,
        ratio=statistics.median(ratios),
        quartiles=(low, high),
        loss_error=verdict.loss_error,
        gradient_error=verdict.gradient_error,
        gradients=verdict.gradients,
        buffers=verdict.buffers,
        difference=verdict.difference,
    )


def _ratios(bench: Bench, first: nn.Module, second: nn.Module, num_pairs: int) -> tuple[float, ...]:
    """Time of the second model's step over the first's, pair by pair."""
    steps = (_step(bench, model) for model in (first, second))
    timing = measure_pair(*steps, repeats=num_pairs, device=bench.device)
    for model in (first, second):
        model.zero_grad(set_to_none=True)
    return timing.ratios


def _step(bench: Bench, model: nn.Module) -> Callable[[], object]:
    run = make_step(model, bench.sample(), seed=bench.seed)

    def step() -> object:
        with bench.context():
            return run()

    return step


def _failed(bench: Bench, method: str, error: BaseException) -> PeerRow:
    return PeerRow(model=bench.subject.name, method=method, error=error_text(error))


def _situation(bench: Bench, model: nn.Module) -> Situation:
    paths = {id(module): name for name, module in model.named_modules()}
    blocks = tuple(paths[id(block)] for block in bench.subject.blocks(model))
    return Situation(
        sample_input=bench.sample(), loss_fn=None, device=bench.device, blocks=lambda: blocks
    )
