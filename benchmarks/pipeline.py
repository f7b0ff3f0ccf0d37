"""GPT-2 in a pipeline: how many layers each stage should have, under one budget for all.

``python -m benchmarks.pipeline`` plans every stage with its micro-batches in flight, for some
budgets, and simulates steps: layers divided by ``planner.plan_pipeline``, the same number in
each stage, one setting for all stages, every layer repeated, and nothing repeated where that
fits. Times are predicted (roofline) and none is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graph_capture.units import format_bytes
from planner import InfeasibleBudgetError, Plan, Stage, optimize, plan_pipeline
from solvers.pipeline import StageTimes, even_ranges, simulate

NUM_LAYERS, WIDTH, VOCABULARY, MICROBATCH, SEQUENCE = 12, 256, 4_096, 4, 256
NUM_STAGES, NUM_MICROBATCHES = 4, 8


class Gpt2Stage(nn.Module):
    """Some of GPT-2's blocks; the first stage has the embeddings, the last one the head."""

    def __init__(self, first: int, end: int) -> None:
        from transformers import GPT2Config
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block

        super().__init__()
        config = GPT2Config(
            vocab_size=VOCABULARY, n_layer=NUM_LAYERS, n_embd=WIDTH, n_head=8, n_positions=SEQUENCE
        )
        config._attn_implementation = "sdpa"
        self.tokens = nn.Embedding(VOCABULARY, WIDTH) if first == 0 else None
        self.positions = nn.Embedding(SEQUENCE, WIDTH) if first == 0 else None
        self.blocks = nn.ModuleList(GPT2Block(config, layer_idx=i) for i in range(first, end))
        is_last = end == NUM_LAYERS
        self.norm = nn.LayerNorm(WIDTH) if is_last else None
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False) if is_last else None

    def forward(self, x: Tensor) -> Tensor:
        """From tokens or hidden states to hidden states or logits."""
        if self.tokens is not None and self.positions is not None:
            x = self.tokens(x) + self.positions.weight
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(self.norm(x)) if self.norm is not None and self.head is not None else x


def plan_stage(stage: Stage, budget_bytes: int, time_limit_s: float) -> Plan:
    """Plan a stage with what the schedule holds beside its calls in flight."""
    is_first, is_last = stage.first == 0, stage.end == NUM_LAYERS
    with torch.device("meta"):
        module = Gpt2Stage(stage.first, stage.end).train()
        tokens = torch.zeros(MICROBATCH, SEQUENCE, dtype=torch.long)
        hidden = torch.zeros(MICROBATCH, SEQUENCE, WIDTH, requires_grad=True)
    waiting = 0 if is_first else NUM_MICROBATCHES - stage.calls_in_flight
    held_bytes = waiting * hidden.nbytes
    if is_last:  # outputs of all micro-batches, and a loss over logits
        logits_bytes = MICROBATCH * SEQUENCE * VOCABULARY * 4
        held_bytes += (NUM_MICROBATCHES - stage.calls_in_flight + 2) * logits_bytes
    return optimize(
        module,
        tokens if is_first else hidden,
        budget_bytes=budget_bytes,
        device="cpu",
        grads="accumulated",
        concurrent_calls=stage.calls_in_flight,
        resident_bytes=held_bytes,
        time_limit_s=time_limit_s,
    )


def todays_settings(budget_bytes: int, time_limit_s: float) -> tuple[float | None, float]:
    """Microseconds of a step with nothing repeated, ``None`` where that does not fit; with all.

    That everything repeated fits is not checked.
    """
    times, fits = [], True
    for index, (first, end) in enumerate(even_ranges(NUM_LAYERS, NUM_STAGES)):
        in_flight = min(NUM_MICROBATCHES, NUM_STAGES - index)
        stage = Stage(index=index, first=first, end=end, calls_in_flight=in_flight)
        plan = plan_stage(stage, 10**12, time_limit_s)
        fits &= plan.predicted_peak_bytes <= budget_bytes
        forward_ns = sum(op.cost_ns for op in plan.graph.operators if op.phase == "forward")
        backward_ns = sum(op.cost_ns for op in plan.graph.operators if op.phase == "backward")
        times.append(StageTimes(forward_ns=forward_ns, backward_ns=backward_ns))
    again = [
        StageTimes(forward_ns=t.forward_ns, backward_ns=t.forward_ns + t.backward_ns) for t in times
    ]
    kept_us, again_us = (simulate(t, NUM_MICROBATCHES).step_ns / 1e3 for t in (times, again))
    return kept_us if fits else None, again_us


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plans of each budget, and what other settings take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets-mb", type=int, nargs="+", default=[400, 300, 250])
    parser.add_argument("--time-limit-s", type=float, default=4.0, help="for each plan")
    options = parser.parse_args(arguments)
    _say(
        f"GPT-2, {NUM_LAYERS} layers, width {WIDTH}, vocabulary {VOCABULARY}, micro-batches of "
        f"{MICROBATCH} x {SEQUENCE}, torch {torch.__version__}, roofline"
    )
    for budget_mb in options.budgets_mb:
        budget_bytes = budget_mb * 10**6
        kept_us, again_us = todays_settings(budget_bytes, options.time_limit_s)
        _say(f"\nBudget of each device: {format_bytes(budget_bytes)}")
        try:
            found = plan_pipeline(
                lambda stage, budget_bytes=budget_bytes: plan_stage(
                    stage, budget_bytes, options.time_limit_s
                ),
                num_layers=NUM_LAYERS,
                num_stages=NUM_STAGES,
                num_microbatches=NUM_MICROBATCHES,
                alike=True,
            )
        except InfeasibleBudgetError as error:
            _say(f"  {error}")
            continue
        _say(str(found))
        _say(f"  every layer repeated: {again_us / 1e3:.1f} ms")
        _say(f"  nothing repeated: {f'{kept_us / 1e3:.1f} ms' if kept_us else 'does not fit'}")


if __name__ == "__main__":
    main()
