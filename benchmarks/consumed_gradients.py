"""What an optimizer in hooks saves: GPT-2 whose gradients are consumed as they arrive.

``python -m benchmarks.consumed_gradients`` plans the same step for a loop that holds gradients to
the end of the backward pass and steps then, and for one whose hooks step as each arrives, at
the same budgets, on the CPU. Each plan is executed: its peak is recorded, and its bits are
compared with eager's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graph_capture.units import format_bytes
from planner import InfeasibleBudgetError, optimize

NUM_LAYERS, WIDTH, VOCABULARY, BATCH, SEQUENCE = 6, 512, 16_384, 2, 128
OPTIMIZERS = ("sgd", "adamw")


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    """Return the model, which computes its own loss, and its input."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_layer=NUM_LAYERS,
        n_embd=WIDTH,
        n_head=8,
        n_positions=SEQUENCE,
        bos_token_id=None,
        eos_token_id=None,
    )
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
    call = {"input_ids": tokens, "labels": tokens.clone(), "use_cache": False}
    return GPT2LMHeadModel(config).train(), call


def least_budget_bytes(model: nn.Module, call: Any, words: dict[str, Any]) -> int:
    """Return the least budget known to work."""
    try:
        optimize(model, call, budget_bytes=1, **words)
    except InfeasibleBudgetError as error:
        return error.min_budget_bytes
    raise AssertionError("a byte is not enough")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time-limit-s", type=float, default=30.0, help="for each solve")
    limit_s = parser.parse_args(arguments).time_limit_s
    model, call = gpt2()
    _say(f"GPT-2, {NUM_LAYERS} layers, width {WIDTH}, vocabulary {VOCABULARY}, ")
    _say(f"batch {BATCH} x {SEQUENCE}, torch {torch.__version__}, CPU, seed 0")
    for optimizer in OPTIMIZERS:
        words = {
            grads: {"optimizer": optimizer, "outputs": "released", "grads": grads}
            for grads in ("none", "consumed")
        }
        least = {grads: least_budget_bytes(model, call, words[grads]) for grads in words}
        _say(f"\n{optimizer}\n")
        for grads, asked in words.items():
            unplanned = optimize(model, call, budget_gb=100, **asked).baseline_peak_bytes
            _say(
                f"grads={grads!r}: least budget {format_bytes(least[grads])}, without a plan "
                f"{format_bytes(unplanned)}"
            )
        _say("\n| budget | grads | overhead | gap | predicted | measured | bits |")
        _say("|---|---|---|---|---|---|---|")
        top = least["none"]
        for budget_bytes in (least["consumed"], top, int(1.15 * top), int(1.3 * top)):
            for grads, asked in words.items():
                if budget_bytes < least[grads]:
                    continue
                plan = optimize(
                    model, call, budget_bytes=budget_bytes, time_limit_s=limit_s, **asked
                )
                found = plan.validate(model, call, repeats=0)
                _say(
                    f"| {format_bytes(budget_bytes)} | {grads} | {plan.overhead:.2%} | "
                    f"{plan.gap:.2%} | {plan.predicted_peak_bytes} | {found.peak.measured:.0f} | "
                    f"{found.bits} |"
                )


if __name__ == "__main__":
    main()
