"""The comparison that users hold: its figures as tables, files and plots."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..comparison_record import ComparisonRecord
from ..plots import plot_compiled, plot_pareto, plot_predicted
from ..plots.compiled_frontier import compiled_points
from ..plots.titles import title_of_comparison
from .files import load_comparison, save_comparison
from .table import table
from .views import data_frame, records

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(ComparisonRecord):
    """Strategies and peers on one step, replayed the same way; ``str()`` is a table.

    Made by :func:`planner.compare`; read from a file by :meth:`load`. The figures are
    the attributes of :class:`planner.comparison_record.ComparisonRecord`.
    """

    @classmethod
    def of(cls, record: ComparisonRecord) -> Comparison:
        """Make a comparison of a record."""
        return cls(**{f.name: getattr(record, f.name) for f in fields(ComparisonRecord)})

    def records(self) -> list[dict[str, Any]]:
        """Return a flat dictionary for each row, as in the CSV; ``None`` where there is no
        figure."""
        return records(self)

    def to_pandas(self) -> pandas.DataFrame:
        """Return the records as a data frame.

        Raises
        ------
        ImportError
            When pandas is not installed.
        """
        return data_frame(self)

    def __str__(self) -> str:
        return table(self)

    def plot_pareto(self, path: str | Path | None = None, *, measured: bool = False) -> Figure:
        """Plot peak memory against overhead, see :func:`planner.plots.plot_pareto`."""
        return plot_pareto(self, path, measured=measured)

    def plot_predicted(self, path: str | Path | None = None) -> Figure:
        """Plot measured against predicted, see :func:`planner.plots.plot_predicted`."""
        return plot_predicted(self, path)

    def plot_compiled(self, path: str | Path | None = None) -> Figure:
        """Plot measured peak against time of compiled steps, beside our eager plans.

        See :func:`planner.plots.plot_compiled`. Times are over the compiled step without a
        budget.

        Raises
        ------
        ValueError
            When no compiled step was timed.
        """
        steps = self.compiled
        what = "compiled training steps"
        title = title_of_comparison(what, self, predicted=False, measured=True)
        points = () if steps is None else compiled_points(steps, self)
        by = "" if steps is None else f"compiled by {steps.lower}"
        return plot_compiled({by: points}, path, title=title)

    # -- files -------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything as ``.json``, or the records as ``.csv``; completely or not at all.

        Raises
        ------
        ValueError
            When the file's name has neither ending.
        OSError
            When it cannot be written.
        """
        save_comparison(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Comparison:
        """Read a ``.json`` file that :meth:`save` wrote.

        Raises
        ------
        ComparisonFileError
            When the file is not such a comparison, or is damaged.
        """
        return Comparison.of(load_comparison(Path(path)))
