"""Train GPT-2 for a few steps at half its memory: ``make demo``.

Two copies of the same model see the same data. One trains as it is, the other by a plan
for half the peak. Their losses are printed side by side and must be bitwise equal.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from graph_capture.units import format_bytes
from planner import InfeasibleBudgetError, Plan, measure, optimize
from planner.base.training_step import make_step
from planner.measuring.measure import measure_pair

Batch = dict[str, torch.Tensor]


def build(num_layers: int, width: int, length: int) -> nn.Module:
    """Build GPT-2 from its configuration, with random weights and dropout; nothing is
    downloaded."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=num_layers,
        n_embd=width,
        n_head=width // 64,
        n_positions=length,
        vocab_size=4096,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        loss_type="ForCausalLMLoss",
    )
    return GPT2LMHeadModel(config).train()


def batch(seed: int, size: int, length: int) -> Batch:
    """Make a batch that counts modulo a random step, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 4096, (size, 1), generator=generator)
    stride = torch.randint(1, 8, (size, 1), generator=generator)
    tokens = (start + stride * torch.arange(length)) % 4096
    return {"input_ids": tokens, "labels": tokens}


def train(plain: nn.Module, planned: nn.Module, num_steps: int, size: int, length: int) -> Table:
    """Train both copies on the same batches with the same seeds."""
    table = Table("step", "loss without plan", "loss by plan", "bits")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-4) for m in (plain, planned)]
    with Progress(transient=True) as bar:
        for step in bar.track(range(num_steps), description="training both copies"):
            losses = []
            for model, optimizer in zip((plain, planned), optimizers, strict=True):
                torch.manual_seed(step)
                optimizer.zero_grad()
                loss = model(**batch(step, size, length)).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            same = "equal" if torch.equal(*losses) else "DIFFERENT"
            table.add_row(str(step), f"{losses[0]:.6f}", f"{losses[1]:.6f}", same)
    return table


def plan_at(model: nn.Module, sample: Batch, fraction: float) -> Plan:
    """Make a plan for a fraction of the model's own peak, or for the least possible peak."""
    peak_bytes = measure(model, sample, optimizer="adamw", repeats=0).peak_bytes
    try:
        return optimize(
            model,
            sample,
            budget_bytes=int(fraction * peak_bytes),
            optimizer="adamw",
            time_limit_s=30,
            progress=True,
        )
    except InfeasibleBudgetError as error:
        Console().print(str(error))
        return optimize(
            model, sample, budget_bytes=error.min_budget_bytes, optimizer="adamw", progress=True
        )


def main() -> None:
    """Plan, measure, train, compare."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--fraction", type=float, default=0.5, help="of the peak without a plan")
    options = parser.parse_args()

    console = Console()
    torch.manual_seed(0)
    plain = build(options.layers, options.width, options.length)
    planned = copy.deepcopy(plain)
    sample = batch(0, options.batch, options.length)
    parameters = sum(p.numel() for p in plain.parameters())
    console.print(
        f"GPT-2, {options.layers} layers of width {options.width}, {parameters / 1e6:.1f} M "
        f"parameters, batch {options.batch} x {options.length} tokens, AdamW"
    )
    plan = plan_at(planned, sample, options.fraction)
    console.print(str(plan), highlight=False, soft_wrap=True)

    plan.apply(planned)
    without = measure(plain, sample, optimizer="adamw", repeats=0)
    by_plan = measure(planned, sample, optimizer="adamw", repeats=0)
    paired = measure_pair(
        make_step(plain, sample, seed=0), make_step(planned, sample, seed=0), repeats=5
    )
    figures = Table("", "predicted", "measured")
    figures.add_row(
        "peak without a plan",
        format_bytes(plan.baseline_peak_bytes),
        format_bytes(without.peak_bytes),
    )
    figures.add_row("budget", format_bytes(plan.budget_bytes), "")
    figures.add_row(
        "peak by plan", format_bytes(plan.predicted_peak_bytes), format_bytes(by_plan.peak_bytes)
    )
    figures.add_row("extra time", f"{plan.overhead:+.1%}", f"{paired.ratio - 1:+.1%} (5 pairs)")
    figures.add_row("gap to the optimum", f"at most {plan.gap:.2%}", "")
    console.print(figures)
    console.print(train(plain, planned, options.steps, options.batch, options.length))
    if by_plan.peak_bytes > plan.budget_bytes:
        raise SystemExit("the measured peak is above the budget")


if __name__ == "__main__":
    main()
