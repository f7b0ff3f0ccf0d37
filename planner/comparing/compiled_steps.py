"""Compiled steps beside each other: without a budget, by PyTorch's budgets, and by ours.

PyTorch's ``activation_memory_budget`` is a ratio of saved bytes. What peak it comes to is seen
only afterwards. So its ratios are measured first, and backend ``"remat"`` then gets each of the
realized peaks as its budget: what it makes of the same memory. Gradients are compared with the
compiled step that has no budget.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import nn

from graph_capture.json_text import read_json

from ..base.atomic_write import write_whole
from ..base.training_step import LossFn, Sample
from ..compiled.options import Lower
from ..compiled_record import CompiledRecord, CompiledRow
from ..plots.compiled_frontier import CompiledPoint, compiled_points
from .compiled_runs import ModelWithLoss, read_ratios, run_compiled
from .compiled_table import markdown
from .files import ComparisonFileError

FORMAT = "remat-compiled-steps"


@dataclass(frozen=True, kw_only=True)
class CompiledSteps(CompiledRecord):
    """Compiled steps of one model, the one without a budget first; ``str()`` is a table.

    The figures are the attributes of :class:`planner.compiled_record.CompiledRecord`.
    """

    @classmethod
    def of(cls, record: CompiledRecord) -> CompiledSteps:
        """Make it of a record."""
        return cls(**{f.name: getattr(record, f.name) for f in fields(CompiledRecord)})

    @property
    def points(self) -> tuple[CompiledPoint, ...]:
        """What a figure shows: rows that ran and were timed."""
        return compiled_points(self)

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
        return markdown(self)


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

    :func:`planner.compare` with ``compiled_ratios`` has the same rows beside eager ones.

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

    Notes
    -----
    Code that ``torch.compile`` made in this process is dropped, before and after.
    """

    def told(row: CompiledRow) -> None:
        if row.is_over_budget:
            raise AssertionError(f"a compiled step is above its budget: {row}")
        on_row(row)

    found = run_compiled(
        model,
        sample_input,
        ratios=read_ratios(ratios),
        loss_fn=loss_fn,
        lower=lower,
        repeats=repeats,
        seed=seed,
        name=name,
        on_row=told,
    )
    return CompiledSteps.of(found)


__all__ = ["CompiledRow", "CompiledSteps", "ModelWithLoss", "compare_compiled"]
