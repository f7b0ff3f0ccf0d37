"""Batches of changing length: one plan for all of them beside eager and per-layer checkpointing.

``python -m benchmarks.lengths`` trains GPT-2 on batches whose lengths are drawn from a
histogram as fine-tuning data have it (log-normal, padded to the longest of a batch and to a
multiple of eight), for each batch in turn without a plan, with a checkpoint around each
layer, and by one plan that was made for the longest batch at per-layer checkpointing's peak.
It prints the time of all steps, captures included, the highest peak (each length is
measured once), and what the first step of a length cost.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from graph_capture.units import format_bytes
from planner import AppliedPlan, Plan, applied_plan, measure, optimize

VOCABULARY = 4096
LONGEST = 512
MULTIPLE = 8


def lengths(num_batches: int, batch_size: int, seed: int = 0) -> list[int]:
    """The padded length of each batch, in tokens."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_batches, batch_size, generator=generator)
    longest = (4.9 + 0.5 * drawn).exp().max(dim=1).values.clamp(MULTIPLE, LONGEST)
    padded: list[int] = (longest.div(MULTIPLE).ceil() * MULTIPLE).int().tolist()
    return padded


def batch(length: int, batch_size: int, seed: int) -> dict[str, Tensor]:
    """Token ids, a mask and labels, int64[batch_size, length]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch_size, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def build(num_layers: int, width: int) -> nn.Module:
    """GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    config = GPT2Config(
        n_layer=num_layers,
        n_embd=width,
        n_head=width // 64,
        n_positions=LONGEST,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(config).train()
    return model


def step_s(model: Any, call: dict[str, Tensor], seed: int) -> float:
    """The thread's time for one training step without an optimizer."""
    torch.manual_seed(seed)
    begin_s = time.thread_time()
    model(**call).loss.backward()
    taken_s = time.thread_time() - begin_s
    model.zero_grad()
    return taken_s


def highest_peak(model: nn.Module, of: set[int], batch_size: int) -> int:
    """Of one step of each length, measured."""
    return max(measure(model, batch(n, batch_size, 0), repeats=0).peak_bytes for n in of)


def train(
    models: dict[str, nn.Module], drawn: list[int], batch_size: int, progress: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds of every step of every model, in turn."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for i, length in enumerate(drawn):
        for name, model in models.items():
            times[name].append(step_s(model, batch(length, batch_size, i), i))
        progress(i)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    drawn = lengths(options.steps, options.batch)
    largest = batch(LONGEST, options.batch, 0)
    eager = build(options.layers, options.width)
    per_layer: Any = copy.deepcopy(eager)
    per_layer.gradient_checkpointing_enable()
    budget_bytes = measure(per_layer, largest, repeats=0).peak_bytes
    plan = optimize(eager, largest, budget_bytes=budget_bytes, shapes="sample", headroom=0)
    planned = plan.apply(copy.deepcopy(eager))
    models = {"without a plan": eager, "checkpoint per layer": per_layer, "one plan": planned}
    for model in models.values():
        step_s(model, largest, 0)  # warm
    fixed = [step_s(planned, largest, i) for i in range(5)]
    times = train(models, drawn, options.batch, lambda i: console.print(f"{i}", end="\r"))
    applied = applied_plan(planned)
    assert applied is not None
    report(console, options, drawn, plan, applied, times, fixed)
    peaks = {n: highest_peak(m, set(drawn), options.batch) for n, m in models.items()}
    console.print({name: format_bytes(peak) for name, peak in peaks.items()})
    console.print(f"budget {format_bytes(budget_bytes)}: kept {peaks['one plan'] <= budget_bytes}")


def report(
    console: Console,
    options: argparse.Namespace,
    drawn: list[int],
    plan: Plan,
    applied: AppliedPlan,
    times: dict[str, list[float]],
    fixed: list[float],
) -> None:
    """Print what was measured, the peaks apart."""
    table = Table("steps of changing length", "seconds", "of eager", "µs per token")
    tokens = options.batch * sum(drawn)
    total = {name: sum(all_of) for name, all_of in times.items()}
    for name, seconds in total.items():
        share = seconds / total["without a plan"]
        table.add_row(name, f"{seconds:.1f}", f"{share:.3f}", f"{seconds / tokens * 1e6:.1f}")
    without = total["one plan"] - applied.capture_s
    table.add_row(
        "one plan, captures apart",
        f"{without:.1f}",
        f"{without / total['without a plan']:.3f}",
        f"{without / tokens * 1e6:.1f}",
    )
    console.print(table)
    longest = sorted(fixed)[len(fixed) // 2] / (options.batch * LONGEST)
    console.print(
        f"{options.layers} layers, width {options.width}, batch {options.batch}: "
        f"{len(drawn)} steps of {len(set(drawn))} lengths, {min(drawn)} to {max(drawn)}; "
        f"{applied.captures} captures, {applied.capture_s:.1f} s in all, "
        f"{applied.capture_s / max(applied.captures, 1):.2f} s each; planned for {LONGEST} at "
        f"+{plan.overhead:.1%}, {longest * 1e6:.1f} µs per token there"
    )


if __name__ == "__main__":
    main()
