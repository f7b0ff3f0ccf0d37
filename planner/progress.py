"""How a running solve is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from graph_capture.units import format_us
from solvers.progress import ProgressEvent

ShowProgress = bool | Callable[[ProgressEvent], None] | None


@contextmanager
def showing(progress: ShowProgress) -> Iterator[Callable[[ProgressEvent], None] | None]:
    """A listener for a solve: the caller's own, a progress bar, or none."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield None
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True
    ) as bar:
        task = bar.add_task("solving", total=None)

        def show(event: ProgressEvent) -> None:
            best = "none yet" if event.incumbent_ns is None else format_us(event.incumbent_ns / 1e3)
            gap = "" if event.gap is None else f", gap {event.gap:.2%}"
            bound = format_us(event.bound_ns / 1e3)
            bar.update(task, description=f"solving: best {best}, bound {bound}{gap}")

        yield show
