"""Compare a plan's predicted overhead with the measured one.

For each model and budget, a plan on profiled (or roofline) times is applied to a copy of
the model; then planned and eager steps run in turn. A row has the prediction and the
measurement:

    python -m benchmarks.profile_accuracy --threads 1 --budgets 1.0 0.6 0.4

With a budget of 1.0 nothing is recomputed: the difference there is not due to the
profile, but to the Python and autograd work that a planned step saves. Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from graph_capture.costs.profile import Profile
from graph_capture.costs.resolve import CostModelChoice
from planner import Plan, optimize
from planner.base.training_step import make_step
from planner.errors import InfeasibleBudgetError
from planner.measuring.measure import PairedTiming, measure_pair, quartiles

from .testing.zoo import (
    ZOO,
    Case,
)

_SPECIAL = "gpt2:4x256x256, bert:6x768x512 (layers x width x tokens, batch 4)"
_VOCABULARY = 4096
_GIVEN = ("gpt2:4x256x256", "bert:4x256x256", "gpt2:4x768x256", "bert:4x768x256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan, predicted and measured."""

    model: str
    budget: float
    plan: Plan
    timing: PairedTiming
    plan_s: float

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Measured overhead: lower quartile, median, upper quartile."""
        low, high = quartiles(self.timing.ratios)
        return low - 1, statistics.median(self.timing.ratios) - 1, high - 1


def transformer(kind: str, layers: int, width: int, length: int) -> Case:
    """GPT-2 or BERT as a language model, dropout 0.1, random weights, batch 4."""

    def build() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

        if kind == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=_VOCABULARY,
                    n_positions=length,
                    n_embd=width,
                    n_layer=layers,
                    n_head=max(4, width // 64),
                    bos_token_id=0,
                    eos_token_id=0,
                )
            ).train()
        return BertForMaskedLM(
            BertConfig(
                vocab_size=_VOCABULARY,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=max(4, width // 64),
                intermediate_size=4 * width,
                max_position_embeddings=length,
            )
        ).train()

    def sample(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, _VOCABULARY, (4, length), generator=generator)
        return {"input_ids": tokens, "labels": tokens.clone()}

    return Case(name=f"{kind}:{layers}x{width}x{length}", build=build, sample=sample)


def case_named(name: str) -> Case:
    """A model of ``testing/zoo.py`` in its small size, or a transformer of given sizes."""
    if name in ZOO:
        return ZOO[name]("small")
    kind, _, measures = name.partition(":")
    if kind not in ("gpt2", "bert") or measures.count("x") != 2:
        raise SystemExit(f"unknown model {name!r}: {', '.join(ZOO)}; {_SPECIAL}")
    return transformer(kind, *map(int, measures.split("x")))


def rows_of(
    case: Case,
    budgets: Sequence[float],
    *,
    cost_model: CostModelChoice,
    device: torch.device,
    num_pairs: int,
    time_limit_s: float,
    seed: int,
) -> Iterator[Row]:
    """Plan and measure one model at several shares of its peak without a plan."""
    model, sample = case.make(seed).to(device), _moved(case.sample(seed), device)
    eager = _step(case, model, sample, seed)
    with case.context():
        peak_bytes = _plan(case, model, sample, 10**15, cost_model, 0.0, seed).baseline_peak_bytes
        for budget in budgets:
            began_s = time.monotonic()
            try:
                plan = _plan(
                    case,
                    model,
                    sample,
                    round(budget * peak_bytes),
                    cost_model,
                    time_limit_s,
                    seed,
                )
            except InfeasibleBudgetError:
                continue
            plan_s = time.monotonic() - began_s
            planned = plan.apply(copy.deepcopy(model))
            timing = measure_pair(
                eager, _step(case, planned, sample, seed), repeats=num_pairs, device=device
            )
            yield Row(model=case.name, budget=budget, plan=plan, timing=timing, plan_s=plan_s)


def _plan(
    case: Case,
    model: nn.Module,
    sample: Any,
    budget_bytes: int,
    cost_model: CostModelChoice,
    time_limit_s: float,
    seed: int,
) -> Plan:
    return optimize(
        model,
        sample,
        budget_bytes=budget_bytes,
        loss_fn=case.loss_fn,
        cost_model=cost_model,
        headroom=0,
        time_limit_s=time_limit_s,
        seed=seed,
    )


def _step(case: Case, model: nn.Module, sample: Any, seed: int) -> Callable[[], Any]:
    return make_step(model, sample, loss_fn=case.loss_fn, seed=seed)


def _moved(tree: Any, device: torch.device) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), tree)


def table_of(rows: Sequence[Row], title: str) -> Table:
    """Times in ms; overheads in per cent, the measured one as median and quartiles."""
    table = Table(title=title)
    table.add_column("model")
    headings = (
        "budget",
        "eager predicted",
        "measured",
        "planned predicted",
        "measured",
        "overhead predicted",
        "measured",
        "quartiles",
        "off by (points)",
        "plan (s)",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        low, middle, high = row.quartiles
        table.add_row(
            row.model,
            f"{row.budget:.0%}",
            f"{row.plan.baseline_step_us / 1e3:.1f}",
            f"{statistics.median(row.timing.first_us) / 1e3:.1f}",
            f"{row.plan.predicted_step_us / 1e3:.1f}",
            f"{statistics.median(row.timing.second_us) / 1e3:.1f}",
            f"{row.plan.overhead:.1%}",
            f"{middle:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{(row.plan.overhead - middle) * 100:+.1f}",
            f"{row.plan_s:.1f}",
        )
    return table


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=_GIVEN, help=f"{', '.join(ZOO)}; {_SPECIAL}")
    parser.add_argument("--budgets", nargs="+", type=float, default=(1.0, 0.6, 0.4))
    parser.add_argument("--threads", nargs="+", type=int, default=(1,))
    parser.add_argument("--pairs", type=int, default=12, help="pairs of steps (12)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--costs", choices=("profile", "roofline"), default="profile")
    parser.add_argument("--cache-dir", type=Path, help="of measured times; the user's if not given")
    parser.add_argument("--time-limit", type=float, default=20.0, help="seconds a plan (20)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    costs = Profile(cache_dir=options.cache_dir) if options.costs == "profile" else "roofline"
    cases = [case_named(name) for name in options.models]
    console = Console(width=170)
    for num_threads in options.threads:
        torch.set_num_threads(num_threads)
        rows: list[Row] = []
        for case in cases:
            found = rows_of(
                case,
                options.budgets,
                cost_model=costs,
                device=torch.device(options.device),
                num_pairs=options.pairs,
                time_limit_s=options.time_limit,
                seed=options.seed,
            )
            for row in found:
                console.print(_line(row), highlight=False)
                rows.append(row)
        where = rows[0].plan.costs.device if rows else options.device
        title = (
            f"{where}; torch {torch.__version__}, {num_threads} threads, {options.pairs} pairs, "
            f"seed {options.seed}"
        )
        console.print(table_of(rows, title))


def _line(row: Row) -> str:
    """A line to print as soon as a row is measured; the table follows at the end."""
    low, middle, high = row.quartiles
    costs = "; ".join((f"costs by {row.plan.costs.model}", *row.plan.costs.notes))
    return (
        f"{row.model} at {row.budget:.0%}: overhead predicted {row.plan.overhead:.1%}, "
        f"measured {middle:.1%} ({low:.1%} to {high:.1%}); {costs}"
    )


if __name__ == "__main__":
    main()
