"""Results of a run of the check: JSON both ways, and a verdict."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .bits import Bits, words
from .memory import Memory, worst_fragmentation
from .overhead import Overhead
from .peers import PeerRow
from .portable import Portable

ERROR_ALLOWED = 0.02
"""How far a planned step's predicted peak may be from the measured one, as a share of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A check that ended with an error."""

    model: str
    check: str
    error: str


@dataclass(kw_only=True)
class Results:
    """The results so far; grows while the check runs.

    Parameters
    ----------
    environment
        From :func:`~.environment.environment`.
    subjects
        Each model's name and description.
    """

    environment: dict[str, Any]
    subjects: dict[str, str] = field(default_factory=dict)
    bits: list[Bits] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    overhead: list[Overhead] = field(default_factory=list)
    peers: list[PeerRow] = field(default_factory=list)
    portable: list[Portable] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)

    @property
    def headroom(self) -> float | None:
        """The share that plans should leave free for fragmentation; ``None`` on CPU."""
        return worst_fragmentation(self.memory)

    def faults(self) -> list[str]:
        """Everything that breaks a promise, in words; peers' faults do not count."""
        return [
            *(f"{row.model}, {row.check}: {row.error}" for row in self.failed),
            *(
                f"{row.model}, bits at {row.where}: {words(row)}"
                for row in self.bits
                if row.planned_differs
            ),
            *(fault for row in self.memory for fault in _faults_of_memory(row)),
            *(
                f"{row.model}, planned elsewhere for {row.entry!r}: "
                + (row.refused or f"fingerprints {row.without_device} and {row.here}")
                for row in self.portable
                if not row.same
            ),
        ]

    def write(self, folder: Path) -> None:
        """Write ``results.json``, with every field and the derived figures."""
        data = {
            "circumstances": self.environment,
            "subjects": self.subjects,
            "bits": [asdict(row) for row in self.bits],
            "memory": [
                {
                    **asdict(row),
                    "error": None if row.infeasible else row.error,
                    "within": row.within,
                    "fragmentation": row.fragmentation,
                }
                for row in self.memory
            ],
            "overhead": [asdict(row) for row in self.overhead],
            "peers": [asdict(row) for row in self.peers],
            "portable": [{**asdict(row), "same": row.same} for row in self.portable],
            "failed": [asdict(row) for row in self.failed],
            "headroom": self.headroom,
            "faults": self.faults(),
        }
        (folder / "results.json").write_text(json.dumps(_plain(data), indent=1), encoding="utf-8")


def _faults_of_memory(row: Memory) -> list[str]:
    if row.infeasible:
        return []
    at = f"{row.model}, memory at {row.where}"
    found: list[str] = []
    if not row.within:
        found.append(f"{at}: {row.measured_bytes} bytes are above the budget of {row.budget_bytes}")
    if row.where != "unplanned" and abs(row.error) > ERROR_ALLOWED:
        found.append(
            f"{at}: predicted {row.predicted_bytes}, measured {row.measured_bytes} bytes "
            f"({row.error:+.2%})"
        )
    return found


def _plain(value: Any) -> Any:
    """Numbers that JSON does not know (NaN, infinity) become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
