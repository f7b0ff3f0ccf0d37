"""What an earlier process chose for the same graph and budget, beside Inductor's own caches.

To solve and to read takes longer than to compile what Inductor's cache has the code of. So a
choice is written to a file, in the folder of that cache (``TORCHINDUCTOR_CACHE_DIR``) and as long
as it is in use. A file is found by all that its choice depends on: the graph and Inductor's
settings, the budget, how hard the search is, the versions, and the code of this package.

What a file says is checked as far as it can be: its schedule computes the graph. If it is damaged
or cannot be written, a warning says so, and the choice is made as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from graph_capture.cost_graph import CostGraph
from graph_capture.json_text import read_json
from graph_capture.printable import printable
from graph_capture.private_torch.compiler import inductor_cache_folder
from graph_capture.regular_file import read_regular
from solvers.replay import replay
from solvers.result import SolveStatus
from solvers.schedule import Schedule

from ..base.atomic_write import write_whole
from ..errors import PlanWarning
from .code_name import code_name

_LARGEST_BYTES = 100_000_000
_Kept = TypeVar("_Kept")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A partition of a graph, and what its compiled code takes.

    Parameters
    ----------
    schedule
        Of the priced step; ``None`` for PyTorch's own partition.
    peak_bytes, unplanned_peak_bytes
        Of the compiled step, and of the one without a budget; resident tensors included.
    lower_bound_ns, status
        Of the solve.
    """

    schedule: Schedule | None
    peak_bytes: int
    unplanned_peak_bytes: int
    lower_bound_ns: int
    status: SolveStatus

    @classmethod
    def from_json(cls, text: bytes, graph: CostGraph) -> Choice:
        """Read a choice for a graph.

        Raises
        ------
        ValueError
            When it is not one, or its schedule does not compute the graph.
        """
        said = read_json(text)
        if not isinstance(said, dict) or set(said) != set(cls.__dataclass_fields__):
            raise ValueError("it is not a choice")
        numbers = [said[name] for name in ("peak_bytes", "unplanned_peak_bytes", "lower_bound_ns")]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a number of bytes or a time is not one")
        schedule, status = None, SolveStatus(said["status"])
        if said["schedule"] is not None:
            if not isinstance(said["schedule"], list):
                raise ValueError("its schedule is not a list")
            schedule = Schedule(tuple(said["schedule"]))
            replay(graph, schedule)
        return cls(**{**said, "schedule": schedule, "status": status})

    def to_json(self) -> str:
        """The inverse of :meth:`from_json`."""
        order = None if self.schedule is None else self.schedule.order
        return json.dumps({**asdict(self), "schedule": order})


def place_of(*depends_on: object) -> Path | None:
    """The file of a choice, which need not exist; ``None`` where Inductor's cache is off.

    Parameters
    ----------
    depends_on
        All that the choice depends on beside the code: the graph, the settings, the budget, the
        search; as text the same in each process.
    """
    folder = inductor_cache_folder()
    if folder is None:
        return None
    told = (*depends_on, code_name(), torch.get_num_threads())
    digest = hashlib.sha256(repr(told).encode()).hexdigest()
    return Path(folder) / "remat" / digest[:2] / f"{digest}.json"


def read_choice(path: Path, graph: CostGraph, usable_bytes: int) -> Choice | None:
    """What is kept, if anything is.

    Warns
    -----
    PlanWarning
        When the file cannot be read, is damaged, or speaks of another graph or budget.
    """

    def read(text: bytes) -> Choice:
        choice = Choice.from_json(text, graph)
        if choice.peak_bytes > usable_bytes:
            raise ValueError("its peak is above its budget")
        return choice

    return _read(path, read)


def keep_choice(path: Path, choice: Choice) -> None:
    """Write a choice, whole or not at all.

    Warns
    -----
    PlanWarning
        When it cannot be written.
    """
    _write(path, choice.to_json())


def read_bound(path: Path, most_bytes: int) -> int | None:
    """How much each call of a graph may save, if that is kept.

    Warns
    -----
    PlanWarning
        When the file cannot be read or is damaged.
    """

    def read(text: bytes) -> int:
        bound_bytes = read_json(text)
        if type(bound_bytes) is not int or not 0 < bound_bytes <= most_bytes:
            raise ValueError("it is no number of bytes that a call may save")
        return bound_bytes

    return _read(path, read)


def keep_bound(path: Path, bound_bytes: int) -> None:
    """Write how much each call may save, whole or not at all.

    Warns
    -----
    PlanWarning
        When it cannot be written.
    """
    _write(path, str(bound_bytes))


def _read(path: Path, read: Callable[[bytes], _Kept]) -> _Kept | None:
    try:
        return read(read_regular(path, _LARGEST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # an invalid schedule is a ValueError
        _warn(f"{path} cannot be used ({error}): the plan is made again")
        return None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        _warn(f"{path} cannot be written ({error}): the next process plans again")


def _warn(text: str) -> None:
    warnings.warn(printable(text, lines=True), PlanWarning, stacklevel=4)


__all__ = ["Choice", "keep_bound", "keep_choice", "place_of", "read_bound", "read_choice"]
