"""How the time to a gap grows with the number of layers, and the power law that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .run import Run


class PowerLaw(NamedTuple):
    """``scale * layers ** exponent`` seconds."""

    scale: float
    exponent: float

    def at(self, num_layers: float) -> float:
        return float(self.scale * num_layers**self.exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One run for each number of layers of a family."""

    family: str
    budget: float
    solver: str
    runs: tuple[tuple[int, Run], ...]

    def marks(self) -> dict[str, list[tuple[int, float]]]:
        """``(layers, s)`` for each run that reached a mark."""
        return {
            "to a gap of 0.5 %": self._points("half"),
            "to a proof": self._points("proof"),
        }

    def _points(self, mark: str) -> list[tuple[int, float]]:
        reached = (
            (num_layers, row.gap_s(0.005) if mark == "half" else row.proof_s)
            for num_layers, row in self.runs
        )
        return [(num_layers, seconds) for num_layers, seconds in reached if seconds is not None]

    def fit(self, mark: str) -> PowerLaw | None:
        """Least squares on the logarithms; ``None`` with fewer than two sizes."""
        return power_law(self.marks()[mark])


def power_law(points: list[tuple[int, float]]) -> PowerLaw | None:
    """The power law through ``(layers, s)``, each with the same relative weight."""
    if len({layers for layers, _ in points}) < 2 or any(s <= 0 for _, s in points):
        return None
    layers, seconds = np.log(np.array(points, dtype=np.float64)).T
    exponent, intercept = np.polyfit(layers, seconds, 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))
