"""Measures the cells of one model, each on a copy of its own."""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import planner.compiled
from benchmarks.testing.zoo import ZOO, Case
from graph_capture.private_torch.compiler import backend_named, functorch_config, inductor_config
from planner import InfeasibleBudgetError
from planner.base.training_step import make_step, train_step
from planner.comparing.compiled_runs import ModelWithLoss
from planner.comparing.compiled_ways import (
    UNLIMITED_BYTES,
    Planned,
    remat_options,
    stop_with,
    within_ratio,
)
from planner.compiled.options import Lower
from planner.measuring.measure import measure, measure_pair

from .cell import Cell
from .gradients import (
    OTHER_LOSS,
    TIMES_THE_UNBUDGETED,
    error,
    float64_gradients,
    gradients,
    loss_of,
    same_bits,
    slope_error,
)


class Bench:
    """The cells of one model.

    Parameters
    ----------
    lower
        What graphs are compiled with.
    repeats
        Pairs of timed steps; 0 for none.
    """

    def __init__(self, name: str, size: Any, lower: Lower, repeats: int) -> None:
        self._name, self._lower, self._repeats = name, lower, repeats
        self._model = _built(ZOO[name](size))
        if getattr(self._model, "loss_type", "") is None:
            # Of GPT-2 Transformers knows none and says so in forward, which breaks its graph.
            self._model.loss_type = "ForCausalLM"
        self._sample = ZOO[name](size).sample(0)
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn once, which breaks graphs
            train_step(copy.deepcopy(self._model), self._sample)
        self._plain_model = copy.deepcopy(self._model)
        self._plain = torch.compile(self._plain_model, backend=lower, dynamic=False)
        begin_s = time.perf_counter()
        self._expected = gradients(self._plain_model, self._plain, self._sample)
        self._first_step_s = time.perf_counter() - begin_s
        self._exact = float64_gradients(self._model, self._sample, lower)
        self._tolerance = TIMES_THE_UNBUDGETED * error(self._expected, self._exact)
        beside_bytes = self._beside_the_graph()
        self._outside_bytes, self._unseen_bytes = max(0, beside_bytes), max(0, -beside_bytes)
        self.peak_bytes = self._measured_bytes(self._plain)

    def unbudgeted(self) -> Cell:
        """The step without a budget, twice, which shows what times are worth here."""
        again = gradients(self._plain_model, self._plain, self._sample)
        return self._cell(
            "no budget",
            self._plain_model,
            self._plain,
            again,
            first_step_s=self._first_step_s,
            ratio=None,
        )

    def unfused(self) -> Cell:
        """The step without a budget, every kernel for itself: two compilations may differ so."""
        model = copy.deepcopy(self._model)
        backend = backend_named(self._lower)
        # Backward, too, is compiled at once, under the same settings, and not when it first runs.
        anew = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}

        def one_by_one(module: torch.fx.GraphModule, inputs: Any) -> Any:
            with inductor_config().patch(max_fusion_size=1), functorch_config().patch(anew):
                return backend(module, inputs)

        call = torch.compile(model, backend=one_by_one, dynamic=False)
        begin_s = time.perf_counter()
        found = gradients(model, call, self._sample)
        spent_s = time.perf_counter() - begin_s
        return self._cell("no budget, nothing fused", model, call, found, first_step_s=spent_s)

    def theirs(self, ratio: float) -> Cell:
        """PyTorch's ``activation_memory_budget``."""
        model = copy.deepcopy(self._model)
        call = torch.compile(model, backend=within_ratio(self._lower, ratio), dynamic=False)
        begin_s = time.perf_counter()
        found = gradients(model, call, self._sample)
        spent_s = time.perf_counter() - begin_s
        return self._cell(
            f"PyTorch's {ratio:.3g}", model, call, found, first_step_s=spent_s, ratio=ratio
        )

    def ours(self, budget_bytes: int, asked: str, *, for_times: bool | None = None) -> Cell:
        """Backend ``remat``."""
        model = copy.deepcopy(self._model)
        plans: list[planner.compiled.CompiledPlan] = []
        options = self._options(budget_bytes, plans.append)
        call = torch.compile(model, backend="remat", dynamic=False, options=options)
        begin_s = time.perf_counter()
        try:
            found = gradients(model, call, self._sample)
        except torch._dynamo.exc.BackendCompilerFailed as failure:
            why = f"{failure.inner_exception!s:.160}"
            return Cell(
                model=self._name,
                asked=asked,
                budget_bytes=budget_bytes,
                for_times=for_times,
                failure=why,
            )
        spent_s = time.perf_counter() - begin_s
        (plan,) = plans
        return self._cell(
            asked,
            model,
            call,
            found,
            first_step_s=spent_s,
            budget_bytes=budget_bytes,
            predicted_bytes=plan.predicted_peak_bytes,
            planning_s=plan.planning_s,
            solve_s=plan.solve_s,
            overhead=plan.overhead,
            gap=plan.gap,
            step_us=plan.step_ns / 1e3,
            num_recomputed=plan.num_recomputed,
            for_times=for_times,
        )

    def least_bytes(self) -> int:
        """The least budget that the refusal of an impossible one names."""
        refused = self._stopped(self._options(1 + self._outside_bytes, None))
        assert isinstance(refused, InfeasibleBudgetError)
        return refused.min_budget_bytes

    def _measured_bytes(self, call: Any) -> int:
        """The peak of a step, with what the graph takes but the record does not see."""
        return measure(call, self._sample, repeats=0).peak_bytes + self._unseen_bytes

    def _beside_the_graph(self) -> int:
        """Bytes of the model and its sample that the graph does not take, a buffer for instance.

        Negative where it takes others, labels within a loss function for instance.
        """
        options = remat_options(UNLIMITED_BYTES, stop_with, lower=self._lower, outside_bytes=0)
        planned = self._stopped(options)
        assert isinstance(planned, Planned)
        tensors = [*self._model.parameters(), *self._model.buffers(), *tree_leaves(self._sample)]
        storages = {t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)}
        return sum(s.nbytes() for s in storages) - planned.plan.graph.resident_bytes

    def _stopped(self, options: dict[str, Any]) -> BaseException | None:
        """What ends a compilation before any kernel is compiled."""
        model = copy.deepcopy(self._model)
        call = torch.compile(model, backend="remat", dynamic=False, options=options)
        try:
            train_step(call, self._sample)
        except torch._dynamo.exc.BackendCompilerFailed as failure:
            return failure.inner_exception
        return None

    def _has_other_loss(self, model: nn.Module, call: Any) -> bool:
        expected = loss_of(self._plain_model, self._plain, self._sample)
        return abs(loss_of(model, call, self._sample) - expected) > OTHER_LOSS * abs(expected)

    def _options(self, budget_bytes: int, on_plan: Any) -> dict[str, Any]:
        return remat_options(
            budget_bytes, on_plan, lower=self._lower, outside_bytes=self._outside_bytes
        )

    def _cell(
        self,
        asked: str,
        model: nn.Module,
        call: Any,
        found: list[torch.Tensor],
        **figures: Any,
    ) -> Cell:
        bits_equal, float64_error = same_bits(found, self._expected), error(found, self._exact)
        is_right, slopes = bits_equal or float64_error <= self._tolerance, None
        if not is_right and self._has_other_loss(model, call):
            slopes = slope_error(model, call, self._sample)
            allowed = slope_error(self._plain_model, self._plain, self._sample)
            is_right = slopes <= TIMES_THE_UNBUDGETED * allowed
        time_ratio = None
        if self._repeats:
            first, second = (make_step(c, self._sample, seed=0) for c in (self._plain, call))
            time_ratio = measure_pair(first, second, repeats=self._repeats).ratio
        return Cell(
            model=self._name,
            asked=asked,
            peak_bytes=self._measured_bytes(call),
            bits_equal=bits_equal,
            error=error(found, self._expected),
            float64_error=float64_error,
            slope_error=slopes,
            is_right=is_right,
            time_ratio=time_ratio,
            **figures,
        )


def _built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.build()
    return model if case.loss_fn is None else ModelWithLoss(model, case.loss_fn)


__all__ = ["Bench"]
