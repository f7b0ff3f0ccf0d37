"""Compare every strategy on one step: the same graph, the same replay, the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graph_capture.costs.devices import Device
from graph_capture.costs.resolve import CostModelChoice
from graph_capture.loop.loop_holds import Grads, LoopHolds, Outputs
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.strategies.registry import STRATEGIES, PlainStrategy, Registry
from solvers.strategies.strategy import Strategy

from ..base.data_parallel import Distributed, wrapped_by
from ..base.solve_options import DEFAULT_GAP, SolveOptions
from ..base.step_spec import StepSpec
from ..comparison_record import ComparisonRecord
from ..compiled.options import Lower
from ..planning.captured_call import (
    CapturedCall,
    captured_call,
)
from ..planning.known_least import already_found, known_least_memory
from .budgets import AskedBudget, NamedBudget, ReadBudget, even_budgets, in_bytes, read_budgets
from .comparison import Comparison
from .compiled_runs import check_lower, read_ratios
from .events import (
    ProgressReporter,
    ShowComparison,
    showing_comparison,
)
from .execution.compiled_part import check_compiled, with_compiled
from .execution.execute import (
    executed,
    must_run,
)
from .execution.peer_rows import (
    choose_peers,
    peer_rows,
)
from .execution.runner import Execution
from .machine import autocast_of, dtype_of, machine, name_of, threads_of, versions
from .predict import Predictor, predict_all
from .strategy_choice import (
    MIN_CUT,
    choose_strategies,
    with_min_cut,
)

if TYPE_CHECKING:
    from .peers import Peer


def compare(
    model: nn.Module,
    sample_input: Any,
    *,
    budgets: Iterable[AskedBudget] | None = None,
    strategies: Iterable[str | Strategy | PlainStrategy] | None = None,
    peers: Iterable[str | Peer] = (),
    compiled_ratios: Iterable[float] = (),
    lower: Lower = "inductor",
    registry: Registry | None = None,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    device: str | Device | None = None,
    autocast: torch.dtype | None = None,
    cost_model: CostModelChoice = "roofline",
    outputs: Outputs = "held",
    grads: Grads = "none",
    resident_bytes: int | str = 0,
    distributed: Distributed = None,
    measure: bool | None = None,
    repeats: int = 8,
    time_limit_s: float = 30.0,
    gap: float = DEFAULT_GAP,
    seed: int = 0,
    workers: int = 2,
    name: str | None = None,
    progress: ShowComparison = None,
) -> Comparison:
    """Compare rematerialization strategies on one training step.

    The step is captured once. Each strategy proposes schedules of it, at each budget and
    at its own choice. One judge (``solvers.replay``) computes their memory and time. Each
    distinct schedule that fits is executed on the model: its peak is recorded, its time
    is taken in turn with eager's, and its results are compared with eager's to the last
    bit. Peers are other tools, run as their users run them. The model, its gradients and
    buffers, the inputs, the optimizer and the random generators are restored afterwards.

    Parameters
    ----------
    model, sample_input, loss_fn, optimizer, device, autocast, cost_model
        As for :func:`planner.optimize`.
    outputs, grads, resident_bytes, distributed
        As for :func:`planner.optimize`; steps are executed in such a loop.
    budgets
        Each is a share of the predicted unplanned peak (``0.6``, ``"60%"``), bytes
        (``12_000_000_000``, ``"12GB"``, ``"40GiB"``; a number without a unit from 4096
        on), or the name of a strategy, for its peak at its own choice. ``None`` for
        eight budgets, evenly spaced from the least peak known to be possible to the
        unplanned one. ``[]`` for each strategy's own choice only; strategies that need
        a budget, including ours, are then left out.
    strategies
        Names of the registry, ``"min_cut"`` (PyTorch's partitioner on this graph),
        strategies, or functions of a cost graph and a budget (bytes or ``None``) that
        return one schedule or several. ``None`` for all.
    peers
        Names of ``planner.comparing.peers.PEERS``, or peers of your own.
    compiled_ratios
        Ratios of PyTorch's ``activation_memory_budget``, from 0 to 1: the same step is then
        compiled, too, without a budget, at each of these, and by backend ``"remat"`` with the
        peak that each came to as its budget. These rows are in
        :attr:`~planner.comparison_record.ComparisonRecord.compiled`, apart from eager ones:
        measured, with times and gradients against the compiled step without a budget. Model
        and loss are compiled as one. On the CPU only; each row compiles for seconds to minutes.
    lower
        What compiled steps are compiled with: ``"inductor"``, or ``"aot_eager"``, eager's kernels.
    registry
        Strategies by name; ``None`` for ``solvers.strategies.STRATEGIES``.
    measure
        Whether schedules are executed; ``None`` for yes if the device is at hand.
    repeats
        Timed pairs of an eager step and another, rounded up to an even number.
    time_limit_s, gap, seed, workers
        For each solve, as for :func:`solvers.solve`.
    name
        Name of the model in the comparison; ``None`` for its class.
    progress
        ``True`` shows a bar on stderr; a function receives
        :class:`~planner.comparing.events.ComparisonEvent`.

    Returns
    -------
    Comparison
        Prints as a table. A strategy or a peer that fails is reported in its
        row, and the others go on.

    Raises
    ------
    CaptureError
        When the step cannot be captured.
    TypeError, ValueError
        When an argument is invalid, a name is unknown, or ``measure=True`` and the
        device is not at hand. All are checked before anything is solved.

    Notes
    -----
    The bound of a budget is proven by the solver ``"auto"``, which runs at every budget.
    It holds for every schedule whose first runs keep the base order. Your own strategy
    may leave that order and be below the bound; ``off_order`` of its row says so.
    ``"auto"`` starts from the schedule of the least peak found, if that fits. The search
    for it counts in ``least_solve_s``, not in any row's ``solve_s``.

    Peers named ``compile_budget_*`` and compiled steps call ``torch._dynamo.reset()`` before
    and after they run. This drops everything that ``torch.compile`` has compiled in this process,
    including your own functions: they still work, and are compiled again on their next
    call.
    """
    model, around = wrapped_by(model, distributed)
    spec = StepSpec(
        model=model,
        sample_input=sample_input,
        loss_fn=loss_fn,
        optimizer=optimizer,
        device=device,
        autocast=autocast,
        cost_model=cost_model,
        holds=LoopHolds.of(outputs, grads, resident_bytes, distributed=around),
    )
    options = SolveOptions(time_limit_s=time_limit_s, gap=gap, seed=seed, workers=workers)
    known, names = choose_strategies(strategies, STRATEGIES if registry is None else registry)
    with_own_choice = {n for n, s in known.items() if not s.needs_budget}
    asked = None if budgets is None else read_budgets(budgets, with_own_choice)
    chosen_peers = choose_peers(peers)
    ratios = read_ratios(compiled_ratios)
    check_lower(lower)
    measured_only = ["peers"] * bool(chosen_peers) + ["compiled_ratios"] * bool(ratios)
    if asked == () and not measured_only and with_own_choice.isdisjoint(names):
        raise ValueError(
            f"nothing is asked: budgets is empty, and {', '.join(names) or 'no strategy'} can only "
            "be asked at a budget: give, for example, budgets=['60%'], or leave budgets out for "
            "eight"
        )
    _check(repeats=repeats, measure=measure, name=name)
    with showing_comparison(progress) as tell, captured_call(spec) as call:
        runs = must_run(measure, call.captured.target, model, sample_input, measured_only)
        if ratios:
            check_compiled(spec)
        known = with_min_cut(known, call.captured)
        found = _predicted_part(call, known, names, asked, options, tell, name or _class(model))
        comparison, schedules = found
        comparison = replace(
            comparison,
            dtype=dtype_of(model),
            autocast=autocast_of(call.captured.target.torch_type),
            optimizer=optimizer if isinstance(optimizer, str) else _class(optimizer),
        )
        if not runs:
            return Comparison.of(comparison)
        execution = Execution(spec=spec, repeats=repeats, seed=seed)
        comparison = replace(
            comparison,
            machine=machine(),  # again: the load that matters is the one while steps are timed
            measured_on=name_of(execution.device),
            num_threads=threads_of(execution.device),
            repeats=repeats,
        )
        comparison = executed(comparison, schedules, call, execution, tell)
        at = [NamedBudget(label=b.budget, num_bytes=b.budget_bytes) for b in comparison.bounds]
        rows = peer_rows(chosen_peers, call.captured.graph, execution, tell, at)
        comparison = replace(comparison, rows=(*comparison.rows, *rows))
        if ratios:
            tell.expect(1 + 2 * len(ratios))
            comparison = with_compiled(comparison, execution, ratios, lower, options, tell)
        return Comparison.of(comparison)


def _predicted_part(
    call: CapturedCall,
    registry: Registry,
    names: Sequence[str],
    asked: Sequence[ReadBudget] | None,
    options: SolveOptions,
    tell: ProgressReporter,
    name: str,
) -> tuple[ComparisonRecord, list[Schedule | None]]:
    """The part that needs no device: the comparison, and the schedule of each row."""
    captured = call.captured
    assert captured.unplanned is not None
    assert captured.costs is not None
    baseline = replay(captured.unplanned, Schedule.keep_all(captured.unplanned))
    tell.expect(1)
    tell("least memory")
    was_known = already_found(captured.graph, options.seed) is not None
    begin_s = time.monotonic()
    least = known_least_memory(captured.graph, options.seed)
    least_solve_s = None if was_known else time.monotonic() - begin_s
    predictor = Predictor(captured.graph, baseline.cost_ns / 1e3, least, options, once=(MIN_CUT,))
    budgets: tuple[NamedBudget, ...]
    if asked is None:
        budgets = even_budgets(least.peak_bytes, baseline.peak_bytes)
    else:
        budgets = in_bytes(
            asked,
            unplanned_peak_bytes=baseline.peak_bytes,
            own_peak_bytes=lambda n: predictor.own_peak_bytes(registry[n]),
        )
    strategies = {n: registry[n] for n in names}
    num_own = sum(not s.needs_budget for s in strategies.values())
    tell.expect(len(budgets) * (len(strategies) + 1) + num_own)
    found, bounds = predict_all(predictor, strategies, budgets, tell)
    rows = tuple(one.row for one in found)
    peaks = [row.predicted_peak_bytes for row in rows if row.predicted_peak_bytes is not None]
    comparison = ComparisonRecord(
        model=name,
        rows=rows,
        bounds=bounds,
        baseline_peak_bytes=baseline.peak_bytes,
        baseline_step_us=baseline.cost_ns / 1e3,
        least_bytes=min([least.peak_bytes, *peaks]),
        least_bound_bytes=least.lower_bound_bytes,
        device=captured.costs.device,
        cost_model=captured.costs.model,
        gap=options.gap,
        time_limit_s=options.time_limit_s,
        workers=options.workers,
        fingerprint=captured.graph.fingerprint,
        seed=options.seed,
        versions=versions(),
        machine=machine(),
        least_solve_s=least_solve_s,
    )
    return comparison, [one.schedule for one in found]


def _check(*, repeats: int, measure: bool | None, name: str | None) -> None:
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0:
        raise ValueError(f"repeats must be a whole number from 0 on, got {repeats!r}")
    if measure is not None and not isinstance(measure, bool):
        raise ValueError(f"measure must be True, False or None, got {measure!r}")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"name must be a string, got {name!r}")


def _class(of: nn.Module | torch.optim.Optimizer | None) -> str:
    return "" if of is None else type(of).__name__
