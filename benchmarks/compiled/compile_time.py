"""Time of a first step: compiled without a budget, and within budgets.

``python -m benchmarks.compiled.compile_time`` compiles a LLaMA of 12 layers by plain
``torch.compile``, by backend ``"remat"`` without a limit, and within shares of the unbudgeted
peak. Each step is the first of a new process with empty caches of compiled code, in which
Inductor, the solver and the C++ compiler have run once on something else. Rows say seconds, of
them planning and solving, and the ratio to plain. *Again* is the first step of a second process,
which finds the caches of the first. A process compiles one kernel at a time, so
that what the C++ compiler takes does not depend on the number of cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import planner.compiled
from planner.base.training_step import train_step
from planner.comparing.compiled_ways import UNLIMITED_BYTES
from planner.measuring.measure import measure

WIDTH, LENGTH, BATCH, VOCABULARY = 128, 128, 4, 1000
PLAIN, NO_LIMIT = "plain torch.compile", "ours, no limit"

HEAD = (
    "| step | budget, bytes | measured, bytes | first step, s | of plain | planning, s | "
    "solving, s | gap | again, s | planning, s |\n|" + "---|" * 10
)


def main() -> None:
    """Measure in processes of their own and print rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.stdout.write(f"{json.dumps(_first_step(options.layers, options.budget))}\n")
        return
    plain = _in_a_process(options.layers, None)
    sys.stdout.write(f"{HEAD}\n{_row(PLAIN, None, plain, plain)}\n")
    asked = {NO_LIMIT: UNLIMITED_BYTES}
    asked |= {f"ours, {s:.0%}": round(s * plain["peak_bytes"]) for s in options.shares}
    for text, budget_bytes in asked.items():
        found = _in_a_process(options.layers, budget_bytes)
        sys.stdout.write(f"{_row(text, budget_bytes, found, plain)}\n")
        sys.stdout.flush()


def _in_a_process(layers: int, budget_bytes: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, "--worker", f"--layers={layers}"]
    if budget_bytes is not None:
        command.append(f"--budget={budget_bytes}")
    with tempfile.TemporaryDirectory() as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        said = [
            subprocess.run(
                command, env={**os.environ, **places}, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            for _ in range(2)
        ]
    first, again = (json.loads(text.splitlines()[-1]) for text in said)
    return {**first, **{f"{name}_again": value for name, value in again.items()}}


def _first_step(layers: int, budget_bytes: int | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, sample = _llama(layers)
    train_step(model, sample)
    _warm_up()
    plans: list[planner.compiled.CompiledPlan] = []
    if budget_bytes is None:
        call = torch.compile(model, dynamic=False)
    else:
        options = {"budget_bytes": budget_bytes, "on_plan": plans.append}
        call = torch.compile(model, backend="remat", dynamic=False, options=options)
    begin_s = time.perf_counter()
    train_step(call, sample)
    found = {"first_step_s": time.perf_counter() - begin_s}
    found["peak_bytes"] = measure(call, sample, repeats=0).peak_bytes
    for plan in plans:
        found |= {"planning_s": plan.planning_s, "solve_s": plan.solve_s, "gap": plan.gap}
    return found


def _llama(layers: int) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    sample = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    return LlamaForCausalLM(config).train(), sample


def _warm_up() -> None:
    """Compile something else, within a budget: imports and the solver's own compilation."""
    layers = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(3)]
    other, x = nn.Sequential(*layers), torch.randn(256, 32)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return other(x).square().mean()

    for backend, options in (("inductor", None), ("remat", {"budget_bytes": 800_000})):
        torch.compiler.reset()
        torch.compile(loss, backend=backend, options=options)(x).backward()
    torch.compiler.reset()


def _row(text: str, budget_bytes: int | None, found: dict[str, Any], plain: dict[str, Any]) -> str:
    def seconds(name: str) -> str:
        return f"{found[name]:.1f}" if name in found else ""

    budget = "" if budget_bytes in (None, UNLIMITED_BYTES) else f"{budget_bytes:,}"
    gap = f"{found['gap']:.2%}" if "gap" in found else ""
    ratio = found["first_step_s"] / plain["first_step_s"]
    return (
        f"| {text} | {budget} | {found['peak_bytes']:,} | {seconds('first_step_s')} | "
        f"{ratio:.2f} | {seconds('planning_s')} | {seconds('solve_s')} | {gap} | "
        f"{seconds('first_step_s_again')} | {seconds('planning_s_again')} |"
    )


if __name__ == "__main__":
    main()
