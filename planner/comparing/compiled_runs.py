"""Compile one training step in several ways and run them beside each other.

Each way has a copy of the model, and of the optimizer, of its own. Model and loss are one
module, so that one graph has both. Gradients and times are compared with those of the compiled
step that has no budget, which is itself timed beside eager's.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from graph_capture.loop.loop_holds import LoopHolds
from graph_capture.private_torch.compiler import backend_named, dynamo_config

from .. import compiled
from ..base.resident import resident_tensors, single_device, storage_bytes
from ..base.training_step import LossFn, Sample, clear_gradients, train_step
from ..compiled import CompiledPlan
from ..compiled.options import Lower
from ..compiled_record import CompiledRecord, CompiledRow
from ..measuring.measure import measure
from ..measuring.rounding import TOLERANCE, largest_error, rounding_dtype
from .compiled_ways import UNLIMITED_BYTES, Planned, remat_options, stop_with, within_ratio
from .execution.run_peer import copies, paired_times
from .machine import cpu_name, machine, versions
from .peers.peer import PEER_ERRORS

_MANY_COMPILATIONS = 1000
_LONGEST_FAILURE = 300

Optimizer = torch.optim.Optimizer | str | None
_Side = tuple[nn.Module, Optimizer]


class ModelWithLoss(nn.Module):
    """A model and its loss as one module, so that one graph has both."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss."""
        return self.loss_fn(self.model(*args, **kwargs))


def read_ratios(ratios: Iterable[float]) -> tuple[float, ...]:
    """Return PyTorch's ratios, each once.

    Raises
    ------
    ValueError
        When one is not a number from 0 to 1.
    """
    if isinstance(ratios, str) or not isinstance(ratios, Iterable):
        raise ValueError(f"ratios are numbers from 0 to 1, such as [0.9, 0.3], got {ratios!r}")
    found = tuple(ratios)
    for ratio in found:
        number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        if not (number and 0 <= ratio <= 1):
            raise ValueError(f"an activation memory budget is a ratio from 0 to 1, not {ratio!r}")
    return tuple(dict.fromkeys(map(float, found)))


def check_lower(lower: str) -> None:
    """Refuse what graphs cannot be compiled with.

    Raises
    ------
    ValueError
        Names the choices.
    """
    if lower not in get_args(Lower):
        raise ValueError(f"lower is {' or '.join(map(repr, get_args(Lower)))}, got {lower!r:.100}")


def run_compiled(
    model: nn.Module,
    sample_input: Sample,
    *,
    ratios: Sequence[float],
    loss_fn: LossFn | None,
    optimizer: Optimizer = None,
    lower: Lower,
    repeats: int,
    seed: int,
    resident_bytes: int = 0,
    search: Mapping[str, Any] | None = None,
    name: str = "",
    on_begin: Callable[[str], None] = lambda _what: None,
    on_row: Callable[[CompiledRow], None] = lambda _row: None,
) -> CompiledRecord:
    """Compile and run a step without a budget, by PyTorch's ratios, and by ours at their peaks.

    Code that ``torch.compile`` made in this process before is dropped.

    Parameters
    ----------
    model, sample_input, loss_fn, optimizer, repeats, seed
        As for :func:`planner.measure`; the optimizer counts in peaks and times.
    ratios
        Of :func:`read_ratios`.
    lower
        What graphs are compiled with.
    resident_bytes
        What else the loop has on the device.
    search
        How hard ours searches, by the options of backend ``"remat"``.
    name
        Of the model, its class by default.
    on_begin, on_row
        Are told what is compiled next, and each row once it is there.

    Raises
    ------
    Exception
        When the step cannot be compiled without a budget, what Dynamo or a compiler raises;
        of the others, a row says why.
    """
    rows: list[CompiledRow] = []

    def told(what: str, make: Callable[[], CompiledRow]) -> CompiledRow:
        on_begin(what)
        rows.append(make())
        on_row(rows[-1])
        return rows[-1]

    with dynamo_config().patch(recompile_limit=_MANY_COMPILATIONS):
        steps = _Steps(
            model,
            sample_input,
            loss_fn,
            optimizer,
            lower=lower,
            repeats=repeats,
            seed=seed,
            resident_bytes=resident_bytes,
            search=search or {},
        )
        told("compiled without a budget", steps.unbudgeted)
        theirs = [
            told(f"compiled at PyTorch's {ratio}", lambda ratio=ratio: steps.theirs(ratio))  # type: ignore[misc]
            for ratio in ratios
        ]
        for row in theirs:
            if row.peak_bytes is not None:
                told(
                    f"compiled by ours at the peak of {row.ratio}",
                    lambda row=row: steps.ours(row.peak_bytes, row.ratio),  # type: ignore[misc]
                )
        eager_ratio = steps.eager_ratio()
    torch.compiler.reset()
    about = {**machine(), "versions": versions(), "num_threads": torch.get_num_threads()}
    about |= {"seed": seed, "repeats": repeats, "device": cpu_name()}
    return CompiledRecord(
        name=name or type(model).__name__,
        lower=lower,
        rows=tuple(rows),
        eager_peak_bytes=steps.eager_peak_bytes,
        eager_ratio=eager_ratio,
        about=about,
    )


class _Steps:
    """The steps of one model, each compiled on a copy of its own."""

    def __init__(
        self,
        model: nn.Module,
        sample: Sample,
        loss_fn: LossFn | None,
        optimizer: Optimizer,
        *,
        lower: Lower,
        repeats: int,
        seed: int,
        resident_bytes: int,
        search: Mapping[str, Any],
    ) -> None:
        self._model = model if loss_fn is None else ModelWithLoss(model, loss_fn)
        self._sample, self._optimizer = sample, optimizer
        self._lower, self._repeats, self._seed, self._search = lower, repeats, seed, search
        self._device = single_device(model, sample)
        self._tolerance = TOLERANCE[rounding_dtype(model, self._device)]
        # What a loss function carries with it, in the same way as beside an eager step.
        carried = resident_tensors(model, sample, loss_fn=loss_fn)
        there = resident_tensors(self._model, sample)
        there_bytes = storage_bytes(there, self._device)
        resident_bytes += storage_bytes([*carried, *there], self._device) - there_bytes
        self._holds = LoopHolds(resident_bytes=resident_bytes)
        torch.compiler.reset()
        self._eager = copies(self._model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn once, which breaks a graph
            self._first_step(self._eager)
        eager = self._measured(self._eager)
        self.eager_peak_bytes = eager.peak_bytes
        self._num_graphs = 0
        self._plain = self._compiled(self._counting)
        self._plain_s, self._expected = self._first_step(self._plain)
        self._outside_bytes = self._outside_of_the_graph(eager.resident_bytes)

    def _counting(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        """Compile a graph as without a budget, and count it."""
        self._num_graphs += 1
        return backend_named(self._lower)(module, inputs)

    def eager_ratio(self) -> float | None:
        """Time of the compiled step without a budget over eager's."""
        return self._time_ratio(self._eager, self._plain)

    def unbudgeted(self) -> CompiledRow:
        """The step without a budget, beside itself."""
        found = self._first_step(self._plain)[1]
        return self._row(self._plain, found, kind="unbudgeted", first_step_s=self._plain_s)

    def theirs(self, ratio: float) -> CompiledRow:
        """PyTorch's ``activation_memory_budget``."""
        side = self._compiled(within_ratio(self._lower, ratio))
        return self._tried(side, {"kind": "pytorch", "ratio": ratio})

    def ours(self, budget_bytes: int, ratio: float | None) -> CompiledRow:
        """Backend ``"remat"`` within a budget."""
        asked: dict[str, Any] = {"kind": "remat", "ratio": ratio, "budget_bytes": budget_bytes}
        plans: list[CompiledPlan] = []

        def figures() -> dict[str, Any]:
            if len(plans) != 1:
                raise RuntimeError(NOTHING_PLANNED if not plans else _SEVERAL.format(len(plans)))
            (plan,) = plans
            base_ns = plan.graph.base_cost_ns
            return {
                "predicted_bytes": plan.predicted_peak_bytes,
                "overhead": plan.overhead,
                "least_overhead": plan.lower_bound_ns / base_ns - 1 if base_ns else 0.0,
                "gap": plan.gap,
            }

        call = self._compiled(compiled.remat, self._options(budget_bytes, plans.append))
        row = self._tried(call, asked, figures)
        if row.failure and self._num_graphs > 1 and len(plans) <= 1:
            said = f"{_SEVERAL.format(self._num_graphs)}: {row.failure}"
            return replace(row, failure=said[:_LONGEST_FAILURE])
        return row

    def _tried(
        self,
        side: _Side,
        asked: Mapping[str, Any],
        figures: Callable[[], Mapping[str, Any]] = dict,
    ) -> CompiledRow:
        """The row of a step, or why it did not run."""
        try:
            first_step_s, found = self._first_step(side)
            return self._row(side, found, **asked, **figures(), first_step_s=first_step_s)
        except PEER_ERRORS as error:
            cause = getattr(error, "inner_exception", error)
            said = " ".join(str(cause).split()) or type(cause).__name__
            return CompiledRow(**asked, failure=said[:_LONGEST_FAILURE])

    def _compiled(self, backend: Any, options: dict[str, Any] | None = None) -> _Side:
        model, optimizer = copies(self._model, self._optimizer)
        return torch.compile(model, backend=backend, dynamic=False, options=options), optimizer  # type: ignore[return-value]

    def _first_step(self, side: _Side) -> tuple[float, list[Tensor]]:
        call, _ = side
        clear_gradients(call, self._sample, None)
        start_s = time.perf_counter()
        torch.manual_seed(self._seed)
        train_step(call, self._sample)
        spent_s = time.perf_counter() - start_s
        found = [p.grad.clone() for p in call.parameters() if p.grad is not None]
        clear_gradients(call, self._sample, None)
        return spent_s, found

    def _options(self, budget_bytes: int, on_plan: Any) -> dict[str, Any]:
        return remat_options(
            budget_bytes,
            on_plan,
            lower=self._lower,
            outside_bytes=self._outside_bytes,
            search=self._search,
        )

    def _outside_of_the_graph(self, resident_bytes: int) -> int:
        """Bytes that are there all step long and not in the graph: optimizer state, for one."""
        self._outside_bytes = 0
        side = self._compiled(compiled.remat, self._options(UNLIMITED_BYTES, stop_with))
        planned: Planned | None = None
        try:
            self._first_step(side)
        except PEER_ERRORS as error:
            planned = getattr(error, "inner_exception", None)
            if not isinstance(planned, Planned):
                raise
        if planned is None:  # nothing was planned, as the rows will say
            return 0
        return max(0, resident_bytes - planned.plan.graph.resident_bytes)

    def _row(self, side: _Side, found: list[Tensor], **figures: Any) -> CompiledRow:
        pairs = list(zip(found, self._expected, strict=True))
        error = largest_error(pairs, rounding_dtype(self._model, self._device))
        return CompiledRow(
            **figures,
            peak_bytes=self._measured(side).peak_bytes,
            error=error if math.isfinite(error) else None,
            tolerance=self._tolerance,
            bits_equal=all(torch.equal(a, b) for a, b in pairs),
            time_ratio=self._time_ratio(self._plain, side),
        )

    def _measured(self, side: _Side) -> Any:
        call, optimizer = side
        return measure(
            call,
            self._sample,
            optimizer=optimizer,
            repeats=0,
            seed=self._seed,
            resident_bytes=self._holds.resident_bytes,
        )

    def _time_ratio(self, first: _Side, second: _Side) -> float | None:
        """Median time of the second over the first, by alternating pairs."""
        if not self._repeats:
            return None
        times = paired_times(
            (first, second),
            self._sample,
            None,
            self._repeats,
            self._seed,
            self._device,
            self._holds,
        )
        return statistics.median(b / a for a, b in zip(*times, strict=True))


NOTHING_PLANNED = (
    "Dynamo made no graph of the training step that has a backward pass, so that no budget can be "
    "kept; fullgraph=True shows why"
)
_SEVERAL = (
    "Dynamo cut the training step into {} graphs, each planned alone, and rows of ours are of "
    "steps in one; fullgraph=True shows where"
)


__all__ = [
    "NOTHING_PLANNED",
    "ModelWithLoss",
    "check_lower",
    "read_ratios",
    "run_compiled",
]
