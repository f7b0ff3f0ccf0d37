"""Compiled steps beside each other: without a budget, by PyTorch's budgets, and by ours.

PyTorch's ``activation_memory_budget`` is a ratio of saved bytes. What peak it comes to is seen
only afterwards. So its ratios are measured first, and backend ``"remat"`` then gets each of the
realized peaks as its budget: what it makes of the same memory. Gradients are compared with the
compiled step that has no budget.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graph_capture.json_text import read_json
from graph_capture.private_torch.compiler import backend_named, dynamo_config, functorch_config
from graph_capture.private_torch.trees import tree_leaves
from graph_capture.units import format_bytes

from .. import compiled
from ..base.atomic_write import write_whole
from ..base.training_step import LossFn, Sample, make_step, train_step
from ..compiled import CompiledPlan
from ..errors import PlanWarning
from ..measuring.measure import measure, measure_pair
from ..measuring.rounding import largest_error
from ..plots.compiled_frontier import CompiledPoint
from .files import ComparisonFileError
from .machine import cpu_name, machine, versions
from .peers.peer import PEER_ERRORS

FORMAT = "remat-compiled-steps"
WRONG = 1e-3
"""Relative error from which gradients are wrong; kernels that are fused otherwise differ by
some 1e-6."""

_UNLIMITED_BYTES = 10**15
_MANY_COMPILATIONS = 1000

Lower = Literal["inductor", "aot_eager"]


class ModelWithLoss(nn.Module):
    """A model and its loss as one module, so that one graph has both."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss."""
        return self.loss_fn(self.model(*args, **kwargs))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledRow:
    """One compiled step.

    Parameters
    ----------
    kind
        ``"unbudgeted"``, ``"pytorch"`` or ``"remat"``.
    ratio
        PyTorch's ratio; for ours the one whose peak is the budget.
    budget_bytes, predicted_bytes
        Of ours.
    peak_bytes
        Measured, parameters and inputs included; ``None`` where nothing ran.
    error
        The largest error of a gradient against the step without a budget, relative to the
        gradient's norm, or to a thousandth of all gradients'.
    bits_equal
        Whether all gradients have the same bits.
    time_ratio
        Median time over that of the step without a budget, by alternating pairs; ``None``
        where none was taken.
    overhead, least_overhead, gap
        Of our plan: estimated extra time, what no schedule falls below, and how far the plan's
        time is above that.
    first_step_s
        Seconds of the first step, compilation included.
    failure
        Why nothing ran.
    """

    kind: Literal["unbudgeted", "pytorch", "remat"]
    ratio: float | None = None
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    peak_bytes: int | None = None
    error: float | None = None
    bits_equal: bool = False
    time_ratio: float | None = None
    overhead: float | None = None
    least_overhead: float | None = None
    gap: float | None = None
    first_step_s: float | None = None
    failure: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether its gradients are others than those of the step without a budget."""
        return self.error is not None and not self.error <= WRONG


@dataclass(frozen=True, kw_only=True)
class CompiledSteps:
    """Compiled steps of one model, the one without a budget first.

    Parameters
    ----------
    name
        Of the model.
    lower
        What the graphs were compiled with.
    rows
        The steps.
    about
        The machine, its load, the threads and the versions.
    """

    name: str
    lower: str
    rows: tuple[CompiledRow, ...]
    about: dict[str, Any]

    @property
    def points(self) -> tuple[CompiledPoint, ...]:
        """What a figure shows: rows that ran and were timed."""
        return tuple(
            CompiledPoint(
                kind=row.kind,
                peak_bytes=row.peak_bytes,
                time_ratio=row.time_ratio,
                is_wrong=row.is_wrong,
                label="" if row.ratio is None or row.kind == "remat" else f"{row.ratio:g}",
            )
            for row in self.rows
            if row.peak_bytes is not None and row.time_ratio is not None
        )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        content = {"format": FORMAT, **asdict(self)}
        write_whole(Path(path), json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CompiledSteps:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ComparisonFileError
            When the file is something else.
        """
        try:
            found = read_json(Path(path).read_text("utf-8"))
            if found.pop("format") != FORMAT:
                raise ComparisonFileError(f"{path} has another format than {FORMAT!r}")
            rows = tuple(CompiledRow(**row) for row in found.pop("rows"))
            return cls(rows=rows, **found)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ComparisonFileError(f"{path} is not a file of compiled steps: {error}") from error

    def __str__(self) -> str:
        lines = [f"compiled steps of {self.name} by {self.lower}", _HEAD]
        return "\n".join(
            [*lines, *(" | ".join(("", *_cells(row), "")).strip() for row in self.rows)]
        )


_HEAD = (
    "| step | budget | predicted, bytes | measured, bytes | gradients | time / no budget | "
    "estimated extra time, least, gap | first step, s |\n|---|---|---|---|---|---|---|---|"
)


def _cells(row: CompiledRow) -> Iterator[str]:
    yield {
        "unbudgeted": "no budget",
        "pytorch": f"PyTorch's {row.ratio}",
        "remat": f"ours, at the peak of {row.ratio}",
    }[row.kind]
    yield "" if row.budget_bytes is None else format_bytes(row.budget_bytes)
    yield "" if row.predicted_bytes is None else f"{row.predicted_bytes:,}"
    yield f"{row.peak_bytes:,}" if row.peak_bytes is not None else row.failure
    if row.error is None:
        yield ""
    elif row.is_wrong:
        yield f"**wrong**, error {row.error:.2g}"
    else:
        yield "equal to the bit" if row.bits_equal else f"error {row.error:.1e}"
    yield "" if row.time_ratio is None else f"{row.time_ratio:.2f}"
    if row.overhead is None:
        yield ""
    else:
        yield f"+{row.overhead:.1%}, +{row.least_overhead or 0:.1%}, {row.gap or 0:.2%}"
    yield "" if row.first_step_s is None else f"{row.first_step_s:.0f}"


def compare_compiled(
    model: nn.Module,
    sample_input: Sample,
    *,
    ratios: Sequence[float] = (0.9, 0.6, 0.3, 0.1),
    loss_fn: LossFn | None = None,
    lower: Lower = "inductor",
    repeats: int = 10,
    seed: int = 0,
    name: str = "",
    on_row: Callable[[CompiledRow], None] = lambda _row: None,
) -> CompiledSteps:
    """Compile a training step without a budget, by PyTorch's ratios, and by ours at their peaks.

    Parameters
    ----------
    model
        In training mode; copies of it are compiled and run.
    sample_input
        As for :func:`planner.optimize`.
    ratios
        Of ``torch._functorch.config.activation_memory_budget``.
    loss_fn
        A function of the model's output; without it the model returns its loss.
    lower
        What graphs are compiled with: ``"inductor"``, or ``"aot_eager"``, eager's kernels.
    repeats
        Pairs of timed steps of each row; 0 takes no times.
    seed
        Set before each step.
    name
        Of the model, its class by default.
    on_row
        Is told each row, once it is there.

    Raises
    ------
    ValueError
        When a ratio is not from 0 to 1.
    AssertionError
        When a step of ours takes more than its budget.
    """
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise ValueError(f"an activation memory budget is a ratio from 0 to 1, not {ratio!r}")
    whole = model if loss_fn is None else ModelWithLoss(model, loss_fn)
    rows: list[CompiledRow] = []

    def told(row: CompiledRow) -> CompiledRow:
        rows.append(row)
        on_row(row)
        return row

    with dynamo_config().patch(recompile_limit=_MANY_COMPILATIONS):
        steps = _Steps(whole, sample_input, lower, repeats, seed)
        told(steps.unbudgeted())
        theirs = [told(steps.theirs(ratio)) for ratio in ratios]
        for row in theirs:
            if row.peak_bytes is not None:
                told(steps.ours(row.peak_bytes, row.ratio))
    about = {**machine(), "versions": versions(), "num_threads": torch.get_num_threads()}
    about |= {"seed": seed, "repeats": repeats, "device": cpu_name()}
    return CompiledSteps(
        name=name or type(model).__name__, lower=lower, rows=tuple(rows), about=about
    )


class _Planned(Exception):
    """A plan is there; compiling it is not wanted."""

    def __init__(self, plan: CompiledPlan) -> None:
        super().__init__()
        self.plan = plan


class _Steps:
    """The steps of one model, each compiled on a copy of its own."""

    def __init__(
        self, model: nn.Module, sample: Sample, lower: Lower, repeats: int, seed: int
    ) -> None:
        self._model, self._sample = model, sample
        self._lower, self._repeats, self._seed = lower, repeats, seed
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn once, which breaks a graph
            train_step(copy.deepcopy(model), sample)
        self._plain = self._compiled(lower)
        self._plain_s, self._expected = self._first_step(self._plain)
        self._outside_bytes = self._outside_of_the_graph()

    def unbudgeted(self) -> CompiledRow:
        """The step without a budget, beside itself."""
        found = self._first_step(self._plain)[1]
        return self._row(self._plain, found, kind="unbudgeted", first_step_s=self._plain_s)

    def theirs(self, ratio: float) -> CompiledRow:
        """PyTorch's ``activation_memory_budget``."""
        backend, config = backend_named(self._lower), functorch_config()

        def within(module: torch.fx.GraphModule, inputs: Any) -> Any:
            with config.patch(activation_memory_budget=ratio, enable_autograd_cache=False):
                return backend(module, inputs)

        call = self._compiled(within)
        try:
            first_step_s, found = self._first_step(call)
        except PEER_ERRORS as error:
            return CompiledRow(kind="pytorch", ratio=ratio, failure=f"{error!s:.200}")
        return self._row(call, found, kind="pytorch", ratio=ratio, first_step_s=first_step_s)

    def ours(self, budget_bytes: int, ratio: float | None) -> CompiledRow:
        """Backend ``"remat"`` within a budget."""
        asked: dict[str, Any] = {"kind": "remat", "ratio": ratio, "budget_bytes": budget_bytes}
        plans: list[CompiledPlan] = []
        call = self._compiled(compiled.remat, self._options(budget_bytes, plans.append))
        try:
            first_step_s, found = self._first_step(call)
        except PEER_ERRORS as error:
            cause = getattr(error, "inner_exception", error)
            return CompiledRow(**asked, failure=f"{cause!s:.200}")
        (plan,) = plans
        base_ns = plan.graph.base_cost_ns
        row = self._row(
            call,
            found,
            **asked,
            first_step_s=first_step_s,
            predicted_bytes=plan.predicted_peak_bytes,
            overhead=plan.overhead,
            least_overhead=plan.lower_bound_ns / base_ns - 1 if base_ns else 0.0,
            gap=plan.gap,
        )
        if row.peak_bytes is None or row.peak_bytes > budget_bytes:
            raise AssertionError(f"a compiled step is above its budget: {row}")
        return row

    def _compiled(self, backend: Any, options: dict[str, Any] | None = None) -> Any:
        model = copy.deepcopy(self._model)
        return torch.compile(model, backend=backend, dynamic=False, options=options)

    def _first_step(self, call: nn.Module) -> tuple[float, list[Tensor]]:
        call.zero_grad()
        start_s = time.perf_counter()
        torch.manual_seed(self._seed)
        train_step(call, self._sample)
        spent_s = time.perf_counter() - start_s
        return spent_s, [p.grad.clone() for p in call.parameters() if p.grad is not None]

    def _options(self, budget_bytes: int, on_plan: Any) -> dict[str, Any]:
        return {
            "budget_bytes": budget_bytes,
            "lower": self._lower,
            "on_plan": on_plan,
            "resident_bytes": self._outside_bytes,
        }

    def _outside_of_the_graph(self) -> int:
        """Bytes of the model and its sample that the graph does not take, a buffer for instance."""

        def stop(plan: CompiledPlan) -> None:
            raise _Planned(plan)

        self._outside_bytes = 0
        call = self._compiled(compiled.remat, self._options(_UNLIMITED_BYTES, stop))
        planned: _Planned | None = None
        try:
            train_step(call, self._sample)
        except PEER_ERRORS as error:
            planned = getattr(error, "inner_exception", None)
            if not isinstance(planned, _Planned):
                raise
        if planned is None:
            warnings.warn(NOTHING_PLANNED, PlanWarning, stacklevel=2)
            return 0
        tensors = [*self._model.parameters(), *self._model.buffers(), *tree_leaves(self._sample)]
        storages = {t.untyped_storage() for t in tensors if isinstance(t, Tensor)}
        held_bytes = sum(storage.nbytes() for storage in storages)
        return max(0, held_bytes - planned.plan.graph.resident_bytes)

    def _row(self, call: nn.Module, found: list[Tensor], **figures: Any) -> CompiledRow:
        ratio = None
        if self._repeats:
            first, second = (
                make_step(c, self._sample, seed=self._seed) for c in (self._plain, call)
            )
            ratio = measure_pair(first, second, repeats=self._repeats).ratio
        pairs = list(zip(found, self._expected, strict=True))
        return CompiledRow(
            **figures,
            peak_bytes=measure(call, self._sample, repeats=0).peak_bytes,
            error=largest_error(pairs),
            bits_equal=all(torch.equal(a, b) for a, b in pairs),
            time_ratio=ratio,
        )


NOTHING_PLANNED = (
    "Dynamo made no graph of the training step that has a backward pass, so that no budget can be "
    "kept; fullgraph=True shows why"
)


__all__ = ["CompiledRow", "CompiledSteps", "ModelWithLoss", "compare_compiled"]
