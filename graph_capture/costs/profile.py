"""Measure times on the device: each distinct call of a step runs alone, a few times.

A step of a 12-layer transformer makes some 3,000 calls, of which about a hundred are
distinct. Calls that cannot run alone (see :mod:`~.trial`), do not fit into the
device's free memory, or refuse made-up arguments are left to the roofline, and the
record says so.

Not measured is the time between calls (Python's own work, the autograd engine, views),
and how calls affect one another beyond the state of the caches (see
:mod:`~.timing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from .cost_model import Call, CostRecord, TimingProgress
from .environment import device_name, environment_of
from .free_memory import free_bytes
from .profile_cache import ProfileCache, default_cache_dir
from .roofline import Roofline
from .target import Target
from .timing import median_ns, run_once, time_in_turn
from .trial import REFUSALS, Maker, Trial, argument_bytes, as_in_a_step, call_key, is_safe
from .trial import output_bytes as bytes_handed_out

_BATCH_BYTES = 1 << 30  # of arguments in one batch: far more than any cache

_TOO_LARGE = "too large for the device"
_UNSAFE = "unsafe to run alone"
_REFUSED = "refused made-up arguments"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Request times measured on the device: ``cost_model=Profile(cache_dir=…)``.

    ``cost_model="profile"`` is short for ``Profile()``.

    Parameters
    ----------
    cache_dir
        Directory of the file that stores measured times, created if missing; ``None``
        for ``$XDG_CACHE_HOME/remat-planner`` or, if that is not set,
        ``~/.cache/remat-planner``. Times are kept apart by torch version, processor or
        card, driver, number of threads, and the settings that decide which kernels run.
    """

    cache_dir: str | PathLike[str] | None = None


class ProfiledCosts:
    """The cost model behind :class:`Profile`.

    Parameters
    ----------
    target
        Where calls run.
    options
        As the user gave them.

    Raises
    ------
    ValueError
        When the target is not at hand.
    """

    def __init__(self, target: Target, options: Profile) -> None:
        if not target.at_hand:
            raise ValueError(
                f"cost_model='profile' runs calls on {target.device.title}, but the model does not "
                "lie there: use cost_model='roofline', or plan where the device is and move the "
                "model to it first"
            )
        given = options.cache_dir
        self._device = target.torch_device
        self._environment = environment_of(self._device)
        self.cache = ProfileCache(
            default_cache_dir() if given is None else Path(given), self._environment
        )
        self._roofline = Roofline(target.device)
        self._untimed: dict[str, tuple[str, str]] = {}  # call -> reason and operator
        self._asked: set[str] = set()
        self.num_timed = 0

    def prepare(self, calls: Iterable[Call], progress: TimingProgress | None = None) -> None:
        """Time the calls that are not known yet; an interrupt keeps the times measured so far.

        Parameters
        ----------
        calls
            The calls that :meth:`time_ns` will be asked for; more may follow later.
        progress
            Is told, of the distinct calls to time, which one is next and how many there
            are.
        """
        distinct = {
            call_key(call, self._device.type): call for call in calls if not _is_annotation(call)
        }
        self._asked.update(distinct)
        unknown = {k: c for k, c in distinct.items() if self._is_unknown(k)}
        allowed = {k: c for k, c in unknown.items() if self._may_run(k, c)}
        if not allowed:
            return
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                self._time(allowed, progress)
            torch.cuda.empty_cache()  # the planned step starts without the memory of trials
        else:
            self._time(allowed, progress)

    def time_ns(self, call: Call) -> int:
        """Return the nanoseconds of one run, measured if possible."""
        if _is_annotation(call):
            return 0
        key = call_key(call, self._device.type)
        if key not in self._asked:
            self.prepare([call])
        measured = self.cache.get("time_ns", key)
        return self._roofline.time_ns(call) if measured is None else measured

    def record(self) -> CostRecord:
        threads = torch.get_num_threads()
        where = f"{device_name(self._device)}, {threads} thread{'s' if threads != 1 else ''}"
        notes = [
            f"torch {torch.__version__}",
            f"{len(self._asked)} distinct call{'s' if len(self._asked) != 1 else ''}",
        ]
        if self._untimed:
            notes.append(
                f"{len(self._untimed)} of {len(self._asked)} distinct calls not timed, priced by "
                f"the roofline: {self._reasons()}"
            )
        return CostRecord(model="profile", device=where, notes=tuple(notes))

    def save(self) -> None:
        """Write the measurements to the cache on disk."""
        self.cache.save()

    # -- which calls -------------------------------------------------------------

    def _is_unknown(self, key: str) -> bool:
        return self.cache.get("time_ns", key) is None and key not in self._untimed

    def _may_run(self, key: str, call: Call) -> bool:
        if not is_safe(call.func):
            self._leave(key, call, _UNSAFE)
        elif not self._fits(call):
            self._leave(key, call, _TOO_LARGE)
        else:
            return True
        return False

    def _fits(self, call: Call) -> bool:
        """Whether arguments, outputs and as much again for scratch fit into free memory."""
        free = free_bytes(self._device)
        outputs = bytes_handed_out(call)
        return free is None or argument_bytes(call) + 2 * outputs <= free

    def _leave(self, key: str, call: Call, reason: str) -> None:
        self._untimed[key] = (reason, str(call.func).removesuffix(".default"))

    def _reasons(self) -> str:
        operators: dict[str, list[str]] = {}
        for reason, name in self._untimed.values():
            operators.setdefault(reason, []).append(name)
        return ", ".join(
            f"{len(names)} {reason} ({', '.join(sorted(set(names)))})"
            for reason, names in sorted(operators.items())
        )

    # -- running them ------------------------------------------------------------

    def _time(self, calls: dict[str, Call], progress: TimingProgress | None) -> None:
        num_begun = 0
        with as_in_a_step(self._device):
            maker = Maker(self._device)
            for batch in self._batches(calls):
                samples: dict[str, list[int]] = {}
                try:
                    trials: dict[str, Trial] = {}
                    for key in batch:
                        num_begun += 1
                        if progress is not None:
                            progress(num_begun, len(calls))
                        try:
                            trials[key] = maker.trial(calls[key])
                            run_once(trials[key], self._device)
                        except REFUSALS as error:
                            trials.pop(key, None)
                            self._fail(key, calls[key], error)
                    for key, failure in time_in_turn(trials, self._device, samples).items():
                        self._fail(key, calls[key], failure)
                finally:
                    self._remember(samples)

    def _batches(self, calls: dict[str, Call]) -> Iterator[Sequence[str]]:
        """Batches of calls that run in turn: as many as fit into a part of the free memory."""
        free = free_bytes(self._device)
        room = _BATCH_BYTES if free is None else min(_BATCH_BYTES, free // 4)
        batch: list[str] = []
        taken = 0
        for key, call in calls.items():
            size = argument_bytes(call)
            if batch and taken + size > room:
                yield batch
                batch, taken = [], 0
            batch.append(key)
            taken += size
        if batch:
            yield batch

    def _fail(self, key: str, call: Call, error: Exception) -> None:
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        self._leave(key, call, _TOO_LARGE if out_of_memory else _REFUSED)

    def _remember(self, samples: dict[str, list[int]]) -> None:
        for key, taken_ns in samples.items():
            median = median_ns(taken_ns)
            if median is not None and key not in self._untimed:
                self.cache.put("time_ns", key, median)
                self.num_timed += 1


def _is_annotation(call: Call) -> bool:
    """Whether a call only names a region for the profiler, as an optimizer's step does."""
    return call.func.namespace == "profiler"
