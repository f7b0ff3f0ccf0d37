"""Show the progress of a running solve, and of the timing before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from graph_capture.costs.cost_model import TimingProgress
from graph_capture.units import format_us
from solvers.progress import ProgressEvent

ShowProgress = bool | Callable[[ProgressEvent], None] | None
ShowLines = bool | Callable[[str], None] | None


@contextmanager
def showing(progress: ShowProgress) -> Iterator[Callable[[ProgressEvent], None] | None]:
    """Return a listener for a solve: the caller's own, a progress bar, or none."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield None
        return
    with _bar(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
        task = bar.add_task("solving", total=None)

        def show(event: ProgressEvent) -> None:
            best = "none yet" if event.incumbent_ns is None else format_us(event.incumbent_ns / 1e3)
            gap = "" if event.gap is None else f", gap {event.gap:.2%}"
            bound = format_us(event.bound_ns / 1e3)
            bar.update(task, description=f"solving: best {best}, bound {bound}{gap}")

        yield show


@contextmanager
def showing_timing(progress: ShowProgress) -> Iterator[TimingProgress | None]:
    """Return a listener for a cost model that times calls.

    The caller's own function receives the message of a
    :class:`~solvers.progress.ProgressEvent` without a schedule or a bound. A bar
    appears with the first call that is timed.
    """
    if callable(progress):
        began_s = time.monotonic()

        def tell(place: int, num_calls: int) -> None:
            event = ProgressEvent(
                elapsed_s=time.monotonic() - began_s,
                incumbent_ns=None,
                bound_ns=0,
                gap=None,
                message=_timing(place, num_calls),
            )
            progress(event)

        yield tell
        return
    if not progress:
        yield None
        return
    bar = _bar(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    task = bar.add_task("timing")

    def show(place: int, num_calls: int) -> None:
        bar.start()
        bar.update(task, completed=place, total=num_calls, description=_timing(place, num_calls))

    try:
        yield show
    finally:
        if bar.live.is_started:  # otherwise stopping it would print an empty line
            bar.stop()


def _bar(*columns: ProgressColumn) -> Progress:
    """Return a bar on stderr, which leaves stdout to results."""
    return Progress(*columns, transient=True, console=Console(stderr=True))


def _timing(place: int, num_calls: int) -> str:
    return f"timing {place} of {num_calls} distinct calls"


@contextmanager
def showing_lines(progress: ShowLines) -> Iterator[Callable[[str], None]]:
    """Return a listener for lines of text: the caller's own, a spinner, or one that drops them.

    Raises
    ------
    ValueError
        When ``progress`` is neither a choice nor a function.
    """
    if callable(progress):
        yield progress
    elif progress is True:
        with _bar(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
            task = bar.add_task("", total=None)
            yield lambda line: bar.update(task, description=line)
    elif progress is None or progress is False:
        yield lambda line: None
    else:
        raise ValueError(f"progress must be True or a function, got {progress!r}")
