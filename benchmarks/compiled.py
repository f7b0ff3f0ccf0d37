"""Compiled steps within budgets, beside PyTorch's own budgets: gradients, peaks and times.

``python -m benchmarks.compiled`` prints one row for each cell, as a Markdown table: ten budgets
from the least that is known to work to the unbudgeted peak, and ten ratios of PyTorch's
``activation_memory_budget``. Models are those of the tests (two layers, narrow), because CPU
Inductor compiles slowly. Everything is compared with ``torch.compile`` without a budget, from
the same seed: gradients by their bits and their largest relative error, the peak by the
allocator's record, and with ``--repeats 10`` the time in alternating pairs. A measured peak above
the budget, or more than 2 % from the prediction, ends it with an error, as does a plan that is
slower than one of a lower budget.

``--shares 0.9 0.8 --theirs 0.5 0.1`` asks for certain budgets and ratios.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._pytree import tree_leaves

import planner.compiled
from benchmarks.testing.zoo import ZOO, Case
from graph_capture.private_torch.compiler import functorch_config
from graph_capture.units import format_bytes
from planner import InfeasibleBudgetError
from planner.base.training_step import make_step, train_step
from planner.measuring.measure import measure, measure_pair

MOST_OFF = 0.02
"""Share of the measured peak that the predicted one may be off."""

MODELS = ("bert", "gpt2", "llama", "t5", "vit", "unet")
LOWER = ("inductor", "aot_eager")


class WithLoss(nn.Module):
    """A model and its loss in one graph."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.loss_fn(self.model(*args, **kwargs))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell: what was asked for and what came of it."""

    model: str
    asked: str
    budget_bytes: int | None
    predicted_bytes: int | None
    peak_bytes: int
    bits_equal: bool
    error: float
    time_ratio: float | None
    compile_s: float
    step_us: float | None = None
    note: str = ""

    def __str__(self) -> str:
        budget = "" if self.budget_bytes is None else format_bytes(self.budget_bytes)
        predicted = "" if self.predicted_bytes is None else f"{self.predicted_bytes:,}"
        gradients = "equal to the bit" if self.bits_equal else f"error {self.error:.1e}"
        if self.error > 1e-3:
            gradients = f"**wrong**, error {self.error:.2f}"
        ratio = "" if self.time_ratio is None else f"{self.time_ratio:.2f}"
        return (
            f"| {self.model} | {self.asked} | {budget} | {predicted} | {self.peak_bytes:,} | "
            f"{gradients} | {ratio} | {self.compile_s:.0f} | {self.note} |"
        )


HEAD = (
    "| model | asked for | budget | predicted, bytes | measured, bytes | gradients | "
    "time / no budget | compiled in, s | |\n|---|---|---|---|---|---|---|---|---|"
)


def _built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.build()
    return model if case.loss_fn is None else WithLoss(model, case.loss_fn)


def _gradients(model: nn.Module, call: Any, sample: Any) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    train_step(call, sample)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest error of a gradient, relative to its norm, or a thousandth of all gradients'."""
    total = torch.stack([g.norm() for g in expected]).norm()
    errors = [
        (a - b).norm() / torch.maximum(b.norm(), 1e-3 * total)
        for a, b in zip(found, expected, strict=True)
    ]
    return max(float(e) for e in errors)


def _their_budget(lower: str, budget: float) -> Callable[..., Any]:
    """A backend of its own for each budget, so that Dynamo takes no other's code."""
    backend = lookup_backend(lower)
    config = functorch_config()

    def compile_within(module: torch.fx.GraphModule, inputs: Any) -> Any:
        with config.patch(activation_memory_budget=budget, enable_autograd_cache=False):
            return backend(module, inputs)

    return compile_within


class _Planned(Exception):
    """A plan is there; compiling it is not wanted."""

    def __init__(self, resident_bytes: int) -> None:
        super().__init__()
        self.resident_bytes = resident_bytes


class _Bench:
    """The cells of one model, each on a copy of its own."""

    def __init__(self, name: str, size: Any, lower: str, repeats: int) -> None:
        self._name, self._lower, self._repeats = name, lower, repeats
        self._model = _built(ZOO[name](size))
        if getattr(self._model, "loss_type", "") is None:
            # Of GPT-2 Transformers knows none and says so in forward, which breaks its graph.
            self._model.loss_type = "ForCausalLM"
        self._sample = ZOO[name](size).sample(0)
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train_step(
                copy.deepcopy(self._model), self._sample
            )  # libraries warn once, which breaks graphs
        self._plain_model = copy.deepcopy(self._model)
        self._plain = torch.compile(self._plain_model, backend=lower, dynamic=False)
        start_s = time.perf_counter()
        self._expected = _gradients(self._plain_model, self._plain, self._sample)
        self._compile_s = time.perf_counter() - start_s
        self.peak_bytes = measure(self._plain, self._sample, repeats=0).peak_bytes
        self._outside_bytes = self._outside_of_the_graph()

    def unbudgeted(self) -> Row:
        """The step without a budget, twice, which shows what times are worth here."""
        again = _gradients(self._plain_model, self._plain, self._sample)
        return self._row(
            "no budget", self._plain_model, self._plain, again, self._compile_s, None, None
        )

    def theirs(self, budget: float) -> Row:
        """PyTorch's ``activation_memory_budget``."""
        model = copy.deepcopy(self._model)
        call = torch.compile(model, backend=_their_budget(self._lower, budget), dynamic=False)
        start_s = time.perf_counter()
        found = _gradients(model, call, self._sample)
        spent_s = time.perf_counter() - start_s
        return self._row(f"PyTorch's {budget:g}", model, call, found, spent_s, None, None)

    def ours(self, budget_bytes: int, asked: str) -> Row | str:
        """Backend ``remat``; a text if nothing fits."""
        model = copy.deepcopy(self._model)
        plans: list[planner.compiled.CompiledPlan] = []
        options = self._options(budget_bytes, plans.append)
        call = torch.compile(model, backend="remat", dynamic=False, options=options)
        start_s = time.perf_counter()
        try:
            found = _gradients(model, call, self._sample)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            budget, why = format_bytes(budget_bytes), f"{error.inner_exception!s:.160}"
            return f"| {self._name} | {asked} | {budget} | | | | | | {why} … |"
        spent_s = time.perf_counter() - start_s
        (plan,) = plans
        note = (
            f"{plan.num_recomputed} recomputed, estimated +{plan.overhead:.1%}, gap {plan.gap:.2%}"
        )
        row = self._row(asked, model, call, found, spent_s, plan, note)
        if row.peak_bytes > budget_bytes:
            raise AssertionError(f"above the budget: {row}")
        if abs(row.peak_bytes - plan.predicted_peak_bytes) > MOST_OFF * row.peak_bytes:
            raise AssertionError(f"the prediction is more than {MOST_OFF:.0%} off: {row}")
        return row

    def least_bytes(self) -> int:
        """The least budget that the refusal of an impossible one names."""
        refused = self._stopped(self._options(1 + self._outside_bytes, None))
        assert isinstance(refused, InfeasibleBudgetError)
        return refused.min_budget_bytes

    def _outside_of_the_graph(self) -> int:
        """Bytes of the model and its sample that the graph does not take, a buffer for instance."""

        def on_plan(plan: planner.compiled.CompiledPlan) -> None:
            raise _Planned(plan.graph.resident_bytes)

        planned = self._stopped({"budget_bytes": 10**12, "lower": self._lower, "on_plan": on_plan})
        assert isinstance(planned, _Planned)
        tensors = [*self._model.parameters(), *self._model.buffers(), *tree_leaves(self._sample)]
        storages = {t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)}
        return max(0, sum(s.nbytes() for s in storages) - planned.resident_bytes)

    def _stopped(self, options: dict[str, Any]) -> BaseException | None:
        """What ends a compilation before any kernel is compiled."""
        model = copy.deepcopy(self._model)
        call = torch.compile(model, backend="remat", dynamic=False, options=options)
        try:
            train_step(call, self._sample)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            return error.inner_exception
        return None

    def _options(self, budget_bytes: int, on_plan: Any) -> dict[str, Any]:
        return {
            "budget_bytes": budget_bytes,
            "lower": self._lower,
            "on_plan": on_plan,
            "resident_bytes": self._outside_bytes,
        }

    def _row(
        self,
        asked: str,
        model: nn.Module,
        call: Any,
        found: list[torch.Tensor],
        compile_s: float,
        plan: planner.compiled.CompiledPlan | None,
        note: str | None,
    ) -> Row:
        same = all(torch.equal(a, b) for a, b in zip(found, self._expected, strict=True))
        peak_bytes = measure(call, self._sample, repeats=0).peak_bytes
        time_ratio = None
        if self._repeats:
            first, second = (make_step(c, self._sample, seed=0) for c in (self._plain, call))
            time_ratio = measure_pair(first, second, repeats=self._repeats).ratio
        return Row(
            model=self._name,
            asked=asked,
            budget_bytes=None if plan is None else plan.budget_bytes,
            predicted_bytes=None if plan is None else plan.predicted_peak_bytes,
            peak_bytes=peak_bytes,
            bits_equal=same,
            error=_error(found, self._expected),
            time_ratio=time_ratio,
            compile_s=compile_s,
            step_us=None if plan is None else plan.step_ns / 1e3,
            note=note or "",
        )


def _say_ours(bench: _Bench, budgets: list[int]) -> None:
    """Rows of ours by rising budgets; a larger one never gives a slower plan."""
    before_us = float("inf")
    for budget_bytes in sorted(budgets):
        row = bench.ours(budget_bytes, f"ours, {budget_bytes / bench.peak_bytes:.0%}")
        _say(row)
        if isinstance(row, Row):
            assert row.step_us is not None
            if row.step_us > before_us:
                raise AssertionError(f"slower than with less memory ({before_us} us): {row}")
            before_us = row.step_us


def _say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(ZOO), default=list(MODELS))
    parser.add_argument("--shares", nargs="*", type=float, help="of the unbudgeted peak")
    parser.add_argument("--theirs", nargs="*", type=float, help="ratios of PyTorch's budget")
    parser.add_argument("--cells", type=int, default=10, help="budgets and ratios a model")
    parser.add_argument("--at-theirs", action="store_true", help="ours at PyTorch's realized peaks")
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--lower", choices=LOWER, default="inductor")
    parser.add_argument("--repeats", type=int, default=0, help="pairs of timed steps a cell")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 1000
    parts = [i / max(1, options.cells - 1) for i in range(options.cells)]
    ratios = parts[::-1] if options.theirs is None else options.theirs
    _say(HEAD)
    for name in options.models:
        bench = _Bench(name, options.size, options.lower, options.repeats)
        _say(bench.unbudgeted())
        peaks = []
        for budget in ratios:
            row = bench.theirs(budget)
            peaks.append((budget, row.peak_bytes))
            _say(row)
        if options.shares is None:
            least_bytes = bench.least_bytes()
            more_bytes = bench.peak_bytes - least_bytes
            budgets = [round(least_bytes + part * more_bytes) for part in parts]
        else:
            budgets = [int(share * bench.peak_bytes) for share in options.shares]
        _say_ours(bench, budgets)
        for budget, peak_bytes in peaks if options.at_theirs else ():
            _say(bench.ours(peak_bytes, f"ours, at the peak of {budget:g}"))


if __name__ == "__main__":
    main()
