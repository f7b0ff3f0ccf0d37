"""What a loop that lets go of its outputs saves: GPT-2 with its own vocabulary of 50,257.

``python -m benchmarks.loop_holds`` plans the same step for a loop that holds the outputs to the
end of the step and for one that releases them once it has the loss, at the same budgets, on
the CPU. The loss is the model's own (labels) or the loop's (``loss_fn``). Each plan is executed:
its peak is recorded, and its bits are compared with eager's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph_capture.units import format_bytes
from planner import InfeasibleBudgetError, optimize

VOCABULARY = 50_257
NUM_LAYERS, WIDTH, BATCH, SEQUENCE = 2, 128, 4, 128
SHARES = (0.25, 0.5, 0.75)
"""Of the way from the least budget of the loop that holds to its peak without a plan."""

Step = tuple[nn.Module, dict[str, Tensor | bool], Callable[[Any], Tensor] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A plan at a budget; ``measured_bytes`` and ``bits`` of a real step."""

    outputs: str
    budget_bytes: int
    overhead: float
    gap: float
    predicted_bytes: int
    measured_bytes: int
    bits: str


def gpt2(loss: str) -> Step:
    """Return the model, its input and the loop's loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_layer=NUM_LAYERS, n_embd=WIDTH, n_head=4, n_positions=SEQUENCE
    )
    model = GPT2LMHeadModel(config).train()
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
    labels = tokens.clone()
    if loss == "own":
        return model, {"input_ids": tokens, "labels": labels, "use_cache": False}, None

    def next_token(output: Any) -> Tensor:
        logits = output.logits[:, :-1].reshape(-1, VOCABULARY)
        return F.cross_entropy(logits, labels[:, 1:].reshape(-1))

    return model, {"input_ids": tokens, "use_cache": False}, next_token


def least_budget_bytes(step: Step, outputs: Any) -> tuple[int, int]:
    """Return the least budget known to work, and the peak without a plan."""
    model, sample, loss_fn = step
    asked: dict[str, Any] = {"loss_fn": loss_fn, "optimizer": "adamw", "outputs": outputs}
    unplanned = optimize(model, sample, budget_gb=100, **asked).baseline_peak_bytes
    try:
        optimize(model, sample, budget_bytes=1, **asked)
    except InfeasibleBudgetError as error:
        return error.min_budget_bytes, unplanned
    raise AssertionError("a byte is not enough")


def row(step: Step, outputs: Any, budget_bytes: int, time_limit_s: float) -> Row:
    """Plan, execute and record."""
    model, sample, loss_fn = step
    plan = optimize(
        model,
        sample,
        budget_bytes=budget_bytes,
        loss_fn=loss_fn,
        optimizer="adamw",
        outputs=outputs,
        time_limit_s=time_limit_s,
    )
    found = plan.validate(model, sample, repeats=0)
    return Row(
        outputs=outputs,
        budget_bytes=budget_bytes,
        overhead=plan.overhead,
        gap=plan.gap,
        predicted_bytes=plan.predicted_peak_bytes,
        measured_bytes=int(found.peak.measured),
        bits=found.bits,
    )


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each of the two losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time-limit-s", type=float, default=30.0, help="for each solve")
    limit_s = parser.parse_args(arguments).time_limit_s
    for loss in ("own", "loop's"):
        step = gpt2(loss)
        held_bytes, unplanned_bytes = least_budget_bytes(step, "held")
        released_bytes, released_unplanned_bytes = least_budget_bytes(step, "released")
        _say(f"\nGPT-2, {NUM_LAYERS} layers, width {WIDTH}, batch {BATCH} x {SEQUENCE}, AdamW,")
        _say(f"the {'model' if loss == 'own' else 'loop'} computes the loss\n")
        for outputs, least, unplanned in (
            ("held", held_bytes, unplanned_bytes),
            ("released", released_bytes, released_unplanned_bytes),
        ):
            words = f"least budget {format_bytes(least)}, without a plan {format_bytes(unplanned)}"
            _say(f"outputs {outputs}: {words}")
        _say("\n| budget | outputs | overhead | gap | predicted | measured | bits |")
        _say("|---|---|---|---|---|---|---|")
        budgets = [held_bytes]
        budgets += [int(held_bytes + s * (unplanned_bytes - held_bytes)) for s in SHARES]
        for budget_bytes in (released_bytes, *budgets):
            for outputs in ("held", "released"):
                if outputs == "held" and budget_bytes < held_bytes:
                    continue
                one = row(step, outputs, budget_bytes, limit_s)
                _say(
                    f"| {format_bytes(budget_bytes)} | {outputs} | {one.overhead:.2%} | "
                    f"{one.gap:.2%} | {one.predicted_bytes} | {one.measured_bytes} | {one.bits} |"
                )


if __name__ == "__main__":
    main()
