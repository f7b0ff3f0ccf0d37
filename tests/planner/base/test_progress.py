"""How timing is shown before solving."""

from __future__ import annotations

import pytest

from planner.base.progress import showing_timing
from solvers.progress import ProgressEvent


def test_a_function_is_told_what_is_timed() -> None:
    """The caller's own function gets an event without schedule and bound; its message counts."""
    events: list[ProgressEvent] = []
    with showing_timing(events.append) as tell:
        assert tell is not None
        tell(37, 112)
    (event,) = events
    assert event.message == "timing 37 of 112 distinct calls"
    assert (event.incumbent_ns, event.bound_ns, event.gap) == (None, 0, None)
    assert event.elapsed_s >= 0


def test_nobody_is_told_where_nobody_listens() -> None:
    """Without progress there is no listener."""
    for choice in (None, False):
        with showing_timing(choice) as tell:
            assert tell is None


def test_a_bar_ends_with_the_timing(capsys: pytest.CaptureFixture[str]) -> None:
    """A bar that was begun leaves the screen to the next one, after an error, too."""
    for fails in (False, True):
        try:
            with showing_timing(True) as tell:
                assert tell is not None
                tell(1, 2)
                tell(2, 2)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
    with showing_timing(True):  # a live display that is still there would raise here
        pass


def test_no_bar_where_nothing_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    """A roofline times nothing, and shows nothing."""
    with showing_timing(True):
        pass
    assert capsys.readouterr().out == ""
