"""Plans applied with ``compile=True``, beside the same plans applied as ever.

``python -m benchmarks.compiled_plans`` prints one row for each model: what of the step is
compiled, the largest relative error of a gradient against eager PyTorch, whether the generator
ends in eager's state, measured peaks, the time in alternating pairs, and what the first call
took. A measured peak above the budget ends it with an error. Models are those of the tests,
because CPU Inductor compiles slowly.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings

import torch
from torch import nn

from benchmarks.testing.zoo import ZOO
from graph_capture.units import format_bytes
from planner import Plan, PlanWarning, applied_plan, optimize
from planner.base.training_step import make_step, train_step
from planner.comparing.compiled_steps import ModelWithLoss
from planner.measuring.measure import measure, measure_pair
from planner.measuring.rounding import largest_error

CASES = (("bert", 0.7), ("gpt2", 0.7), ("llama", 0.7), ("t5", 0.75), ("vit", 0.75), ("unet", 0.75))

HEAD = (
    "| model | budget | predicted, bytes | measured, not compiled | measured, compiled | calls "
    "compiled | gradients | time / not compiled | first call, s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def row(name: str, share: float, *, size: str = "tiny", repeats: int = 10) -> str:
    """Plan a model at a share of its peak, apply the plan both ways, compare."""
    case = ZOO[name](size)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model, sample = case.build(), case.sample(0)
    if case.loss_fn is not None:
        model = ModelWithLoss(model, case.loss_fn)
    plan = optimize(model, sample, budget=f"{share:.0%}", time_limit_s=5)
    expected, generator = _step(copy.deepcopy(model), sample)
    ways = [_applied(plan, model, compile=compile) for compile in (False, True)]
    start_s = time.perf_counter()
    found, ended = _step(ways[1], sample)
    first_s = time.perf_counter() - start_s
    assert torch.equal(ended, generator), "the generator ends elsewhere than eager's"
    peaks = [measure(way, sample, repeats=0).peak_bytes for way in ways]
    if max(peaks) > plan.budget_bytes:
        raise AssertionError(f"{name}: {peaks} bytes, budget {plan.budget_bytes}")
    first, second = (make_step(way, sample, seed=0) for way in ways)
    ratio = measure_pair(first, second, repeats=repeats).ratio if repeats else float("nan")
    applied = applied_plan(ways[1])
    assert applied is not None
    assert applied.compiled is not None
    error = largest_error(list(zip(found, expected, strict=True)))
    calls = applied.compiled.compiled, sum(applied.compiled.eager.values())
    return (
        f"| {name} | {share:.0%}, {format_bytes(plan.budget_bytes)} | "
        f"{plan.predicted_peak_bytes:,} | {peaks[0]:,} | {peaks[1]:,} | "
        f"{calls[0]} of {sum(calls)} | error {error:.1e} | {ratio:.2f} | {first_s:.0f} |"
    )


def _applied(plan: Plan, model: nn.Module, *, compile: bool) -> nn.Module:
    return plan.apply(copy.deepcopy(model), compile=compile)


def _step(model: nn.Module, sample: object) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)  # that little is compiled is in the row
        train_step(model, sample)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found, torch.get_rng_state()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[name for name, _ in CASES])
    parser.add_argument("--repeats", type=int, default=10, help="pairs of timed steps")
    options = parser.parse_args()
    sys.stdout.write(f"{HEAD}\n")
    for name, share in CASES:
        if name in options.models:
            sys.stdout.write(f"{row(name, share, repeats=options.repeats)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
