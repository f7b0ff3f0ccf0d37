"""Looking at what forward asks leaves everybody else alone."""

from __future__ import annotations

import cProfile
import gc
import os
import sys
import time

import pytest
from torch import nn

from graph_capture.errors import CaptureError

from ..odd import WIDTH
from .asking import Asks, asking, reads_of


def test_nothing_is_left_behind() -> None:
    """Neither in the files whose functions ran nor in Python's own."""
    before = dict(globals()), os.stat, open, sys.getprofile()
    reads_of(asking(lambda model: getattr(model, "later", 1.0)))
    assert before[0].keys() == globals().keys()
    assert before[1:] == (os.stat, open, sys.getprofile())
    with pytest.raises(CaptureError):
        reads_of(asking(lambda model: float(os.urandom(1)[0])))
    assert "getattr" not in globals()
    assert before[1:] == (os.stat, open, sys.getprofile())


def test_an_ordinary_model_is_asked_for_nothing_more() -> None:
    """Each step compares what it did before."""
    places = reads_of(nn.Sequential(nn.Linear(WIDTH, 4), nn.GELU())).places
    labels = [place.label for place in places]
    assert not [label for label in labels if label.startswith(("the answer", "the state"))]


def test_a_profiler_of_somebody_elses_goes_on() -> None:
    """One that is written in C cannot be taken off and put back."""
    profile = cProfile.Profile()
    profile.enable()
    try:
        reads_of(asking(lambda model: 2.0))
        seen = sys.getprofile()
    finally:
        profile.disable()
    assert seen is profile
    names = {getattr(entry.code, "co_name", "") for entry in profile.getstats()}
    assert "trace_step" in names


def test_what_the_collector_calls_is_not_forwards_own() -> None:
    """It runs whenever there is much to collect."""
    times: list[float] = []

    def note(phase: str, info: dict[str, int]) -> None:
        times.append(time.perf_counter())

    def ask(model: Asks) -> float:
        gc.collect()
        return 2.0

    before = list(gc.callbacks)
    gc.callbacks.append(note)
    try:
        reads_of(asking(ask))
        assert gc.callbacks[-1] is note
    finally:
        gc.callbacks.remove(note)
    assert gc.callbacks == before
