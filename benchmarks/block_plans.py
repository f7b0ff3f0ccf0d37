"""Plans inside blocks against a plan of the whole step and what others recompute.

``python -m benchmarks.block_plans`` plans BERT, GPT-2, LLaMA, ViT and T5 on the CPU at 70, 50 and
40 % of the peak without a plan, and at the peak of per-layer checkpointing. All overheads are
predicted for the same step at the same budget. The plan in blocks is executed as well, and the
allocator's peak is measured. With ``--repeats``, so are times of steps, in turn with eager's: of
the plan in blocks, of a plan of the whole step, and of Transformers' checkpointing of every layer.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from benchmarks.models.registry import SUBJECTS
from graph_capture.cost_graph import CostGraph
from graph_capture.units import format_bytes
from planner import BlockPlan, InfeasibleBudgetError, measure, optimize
from planner.base.step_spec import StepSpec
from planner.base.training_step import make_step
from planner.measuring.measure import measure_pair
from planner.planning.captured_call import captured_call
from solvers.strategies import STRATEGIES, apply_strategy

MODELS = ("bert", "gpt2", "llama", "vit", "t5")
SHARES = (0.7, 0.5, 0.4)
PER_LAYER = "transformers_per_layer"
EVERY_N = ("uniform_every_k", "transformers_every_n_layers", "megatron_full_block")
"""Whole layers, in groups of n or the first n: the best setting that fits counts."""


def overhead_of(name: str, graph: CostGraph, budget_bytes: int, base_ns: int) -> float | None:
    """Return the predicted overhead of a strategy; ``None`` where it does not fit."""
    found = apply_strategy(STRATEGIES[name], graph, budget_bytes=budget_bytes)
    return None if found.cost_ns is None else found.cost_ns / base_ns - 1


def rows(name: str, options: argparse.Namespace) -> None:
    """Print a line for each budget of a model."""
    size, time_limit_s, repeats = options.size, options.time_limit_s, options.repeats
    subject = SUBJECTS[name](size)
    model = subject.build()
    sample: dict[str, Any] = dict(subject.sample())
    if name in ("gpt2", "llama", "t5"):
        sample["use_cache"] = False
    with captured_call(StepSpec(model=model, sample_input=sample)) as call:
        graph, unplanned_bytes = call.captured.graph, call.unplanned_peak_bytes
        assert call.captured.unplanned is not None
        base_ns = call.captured.unplanned.base_cost_ns
    per_layer = apply_strategy(STRATEGIES[PER_LAYER], graph)
    budgets = {f"{share:.0%}": int(share * unplanned_bytes) for share in SHARES}
    if per_layer.peak_bytes is not None:
        budgets["per-layer's"] = per_layer.peak_bytes
    asked = {label: budgets[label] for label in options.budgets or budgets if label in budgets}
    for label, budget_bytes in asked.items():
        layers = overhead_of(PER_LAYER, graph, budget_bytes, base_ns)
        every = [overhead_of(other, graph, budget_bytes, base_ns) for other in EVERY_N]
        best = min((each for each in every if each is not None), default=None)
        try:
            plan = optimize(
                model,
                sample,
                budget_bytes=budget_bytes,
                granularity="blocks",
                time_limit_s=time_limit_s,
            )
        except InfeasibleBudgetError as error:
            least = format_bytes(error.min_budget_bytes)
            _say(f"| {name} | {label} | {format_bytes(budget_bytes)} | from {least} on |")
            continue
        assert isinstance(plan, BlockPlan)
        whole = plan.parts.whole
        by_whole = bound = None
        if whole is not None:
            bound = max(0.0, whole.lower_bound_us * 1e3 / base_ns - 1)
            by_whole = None if whole.step_us is None else whole.step_us * 1e3 / base_ns - 1
        plan.apply(model)
        measured = measure(model, sample, repeats=0).peak_bytes
        BlockPlan.remove(model)
        times = _times(plan, model, sample, options) if repeats else []
        own_bound = max(0.0, plan.lower_bound_us / plan.baseline_step_us - 1)
        cells = [
            name,
            label,
            format_bytes(budget_bytes),
            f"{plan.overhead:.2%} ({own_bound:.2%})",
            f"{_percent(by_whole)} ({_percent(bound)})",
            _percent(layers),
            _percent(best),
            f"{measured / plan.predicted_peak_bytes:.4f}",
            f"{measured / budget_bytes:.3f}",
            *times,
        ]
        _say(f"| {' | '.join(cells)} |")


def _times(
    plan: BlockPlan, model: nn.Module, sample: Any, options: argparse.Namespace
) -> list[str]:
    """Times of steps over eager's, less one: in blocks, of the whole step, every layer."""
    eager = make_step(model, sample, seed=0)
    whole = optimize(
        model, sample, budget_bytes=plan.budget_bytes, time_limit_s=options.time_limit_s
    )
    steps = [make_step(one.apply(copy.deepcopy(model)), sample, seed=0) for one in (plan, whole)]
    if hasattr(model, "gradient_checkpointing_enable"):
        layers = copy.deepcopy(model)
        layers.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        steps.append(make_step(layers, sample, seed=0))
    ratios = (measure_pair(eager, step, repeats=options.repeats).ratio - 1 for step in steps)
    return [f"{ratio:+.1%}" for ratio in ratios]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time-limit-s", type=float, default=60.0, help="for each plan")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--size", default="record")
    parser.add_argument("--repeats", type=int, default=0, help="timed pairs of steps; 0 times none")
    parser.add_argument(
        "--budgets", nargs="*", help="70%%, 50%%, 40%%, per-layer's; all if left out"
    )
    options = parser.parse_args(arguments)
    _say(
        "| model | budget | bytes | in blocks (bound) | whole step (bound) | per layer | every n "
        "| measured / predicted peak | measured / budget |"
        + (" time, in blocks | whole step | per layer |" if options.repeats else "")
    )
    _say("|---|---|---|---|---|---|---|---|---|" + ("---|---|---|" if options.repeats else ""))
    for name in options.models:
        rows(name, options)


if __name__ == "__main__":
    main()
