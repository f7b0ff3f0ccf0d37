"""Check that a plan made without the device equals the plan made on it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from graph_capture.costs.devices import DEVICES
from planner import Plan, PlanMismatchError

from .bench import Bench
from .plan_without_device import (
    plan_in_child,
    plan_without_device,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Portable:
    """A capture on stand-ins beside one on the device.

    Parameters
    ----------
    model
        Name of the subject.
    entry
        The device's name, as for ``optimize(device=…)``.
    without_device
        Fingerprint of the plan made on ``meta`` for the device, after a round
        trip through JSON.
    here
        Fingerprint of the plan made on the device.
    without_device_peak_bytes, here_peak_bytes
        Predicted peaks of the unplanned step. They may differ if kernels' scratch memory
        could only be measured on the device.
    refused
        Why the plan from the file could not be applied; ``""`` if it could.
    """

    model: str
    entry: str
    without_device: str
    here: str
    without_device_peak_bytes: int
    here_peak_bytes: int
    refused: str = ""

    @property
    def same(self) -> bool:
        """Whether both are plans of one step, and the one from the file could be applied."""
        return self.without_device == self.here and not self.refused


def check_portable(bench: Bench) -> Portable:
    """Plan on ``meta`` for the device, save, load, compare, and apply on the device.

    For a card that the planner knows by name, the plan is made in a process that sees no
    card. For another card it is made here, from what the card reports.
    """
    subject = bench.subject
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        if bench.device.type == "cuda" and bench.entry.name in DEVICES:
            plan_in_child(subject, bench.entry.name, bench.seed, path)
        else:
            plan_without_device(subject, bench.entry, bench.seed, path)
        loaded = Plan.load(path)
    here = bench.unplanned()
    refused = ""
    try:
        with bench.applied(loaded):
            pass
    except PlanMismatchError as error:
        refused = str(error)
    return Portable(
        model=subject.name,
        entry=bench.entry.name,
        without_device=loaded.fingerprint,
        here=here.fingerprint,
        without_device_peak_bytes=loaded.baseline_peak_bytes,
        here_peak_bytes=here.baseline_peak_bytes,
        refused=refused,
    )
