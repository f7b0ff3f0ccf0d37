"""Report the progress of a comparison to people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonEvent:
    """A part of a comparison begins.

    Parameters
    ----------
    message
        The part: ``"uniform_sqrt at 60%"``.
    num_done, num_parts
        How many parts came before it, and how many there are as far as known. The
        number of distinct schedules to run is known once all are predicted.
    """

    message: str
    num_done: int
    num_parts: int


ShowComparison = bool | Callable[[ComparisonEvent], None] | None


class ProgressReporter:
    """Counts the parts, and reports each to a listener."""

    def __init__(self, listener: Callable[[ComparisonEvent], None] | None) -> None:
        self._listener = listener
        self.num_done = -1
        self.num_parts = 0

    def expect(self, num_parts: int) -> None:
        """Add a number of parts to the total."""
        self.num_parts += num_parts

    def __call__(self, message: str) -> None:
        """Report that the next part begins."""
        self.num_done += 1
        if self._listener is not None:
            self._listener(
                ComparisonEvent(
                    message=message,
                    num_done=self.num_done,
                    num_parts=max(self.num_parts, self.num_done + 1),
                )
            )


@contextmanager
def showing_comparison(progress: ShowComparison) -> Iterator[ProgressReporter]:
    """A listener for a comparison: the caller's own, a bar on stderr, or none.

    Raises
    ------
    ValueError
        When ``progress`` is neither a choice nor a function.
    """
    if callable(progress):
        yield ProgressReporter(progress)
    elif progress is True:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            transient=True,
            console=Console(stderr=True),
        ) as bar:
            task = bar.add_task("capture", total=None)

            def show(event: ComparisonEvent) -> None:
                bar.update(
                    task,
                    description=event.message,
                    completed=event.num_done,
                    total=event.num_parts,
                )

            yield ProgressReporter(show)
    elif progress is None or progress is False:
        yield ProgressReporter(None)
    else:
        raise ValueError(f"progress must be True or a function, got {progress!r}")
