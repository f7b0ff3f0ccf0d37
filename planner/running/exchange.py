"""Exchange a report among the processes of a job, through the store in which they met.

No collective is used: a process that fails, has another plan, none, or is gone would leave the
others waiting in one. Each process writes one report, a failure included, and reads the others'.
While a process is at work on its report it gives signs of life, so that its end is noticed
in seconds. One that never begins is waited for until a time is over.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from graph_capture.private_torch.processes import default_store

from ..errors import PlanError

logger = logging.getLogger(__name__)

BEAT_S = 1.0
"""Between two signs of life."""
SILENT_S = 30.0
"""Without one, a process that had begun has ended."""
REMINDER_S = 30.0
"""Between two words in the log about those that are waited for."""
_NUM_NAMED = 8
_FAILED = "failed"

_num_exchanges: Counter[tuple[int, ...]] = Counter()  # so far, for each group of ranks

Report = Mapping[str, str]


class Exchange:
    """One exchange; every process of a group makes as many as the others.

    Parameters
    ----------
    ranks
        The group.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks, self.rank = tuple(ranks), dist.get_rank()
        number = _num_exchanges[self.ranks]
        _num_exchanges[self.ranks] += 1
        group = "-".join(map(str, ranks)) if len(self.ranks) < dist.get_world_size() else "all"
        self._prefix = f"remat/exchange/{group}/{number}"
        self._beats: dict[int, tuple[bytes, float]] = {}  # the last sign of each, and since when

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Give signs of life meanwhile; what is raised is reported to the others."""
        over = threading.Event()
        try:
            store = default_store()
            store.set(self._alive(self.rank), "0")
        except RuntimeError as error:
            raise self._without_store(error) from error
        beating = threading.Thread(target=self._beat, args=(store, over), daemon=True)
        beating.start()
        try:
            yield
        except BaseException as error:
            self._tell({_FAILED: f"{type(error).__name__}: {error}"})
            raise
        finally:
            over.set()
            beating.join()

    def reports(self, report: Report, timeout_s: float) -> dict[int, Report]:
        """Write this process's report, and return all of them by rank.

        Raises
        ------
        PlanError
            When another process has failed, has ended, or does not come in time. One that
            comes later than that is told that this one has not waited.
        """
        said: dict[int, Report] = {}
        try:
            self._collect(said, report, timeout_s)
        except BaseException as error:
            if not any(_FAILED in other for other in said.values()):
                self._tell({_FAILED: f"{type(error).__name__}: {error}"})  # who comes late sees it
            raise
        return said

    def _collect(self, said: dict[int, Report], report: Report, timeout_s: float) -> None:
        """Write this process's report, and wait for the others'."""
        deadline = time.monotonic() + timeout_s
        reminder = time.monotonic() + REMINDER_S
        try:
            store = default_store()
            store.set(self._key(self.rank), json.dumps(dict(report)))
            while True:
                for r in self.ranks:
                    if r not in said and store.check([self._key(r)]):
                        said[r] = json.loads(store.get(self._key(r)))
                self._refuse_failed(said)
                missing = [r for r in self.ranks if r not in said]
                left_s = deadline - time.monotonic()
                if not missing or left_s <= 0:
                    break
                self._refuse_ended(store, missing[:_NUM_NAMED])
                if time.monotonic() > reminder:
                    reminder += REMINDER_S
                    logger.warning("waiting for rank %s to apply its plan", named(missing))
                _wait(store, self._key(missing[0]), min(left_s, BEAT_S))
        except RuntimeError as error:  # DistNetworkError among others
            raise self._without_store(error) from error
        if missing:
            raise PlanError(
                f"rank {named(missing)} did not come to compare plans within {timeout_s:g} s (rank "
                f"{self.rank} waited): it has ended, is still planning, or does not apply a plan. "
                "Its own output says which; every process has to apply the plan, or call "
                "check_same_plan"
            )

    def _key(self, of: int) -> str:
        return f"{self._prefix}/{of}"

    def _alive(self, of: int) -> str:
        return f"{self._prefix}/{of}/alive"

    def _beat(self, store: Any, over: threading.Event) -> None:
        number = 0
        while not over.wait(BEAT_S):
            number += 1
            try:
                store.set(self._alive(self.rank), str(number))
            except RuntimeError:  # the exchange itself says it
                return

    def _tell(self, report: Report) -> None:
        """Write a report, and wait for nobody."""
        try:
            default_store().set(self._key(self.rank), json.dumps(dict(report)))
        except RuntimeError:
            logger.debug("the others cannot be told of a failure", exc_info=True)

    def _refuse_failed(self, said: Mapping[int, Report]) -> None:
        failed = [r for r, report in said.items() if _FAILED in report]
        if failed:
            raise PlanError(
                f"rank {named(failed)} could not apply the plan, so that no process does: "
                f"{said[failed[0]][_FAILED]}"
            )

    def _refuse_ended(self, store: Any, missing: Sequence[int]) -> None:
        """Refuse to wait for processes that had begun and give no signs of life any more."""
        now = time.monotonic()
        for r in missing:
            if not store.check([self._alive(r)]):
                continue
            beat = store.get(self._alive(r))
            if r not in self._beats or self._beats[r][0] != beat:
                self._beats[r] = beat, now
            elif now - self._beats[r][1] > SILENT_S:
                raise PlanError(
                    f"rank {r} has ended while it applied the plan, so that no process does: it "
                    f"gave no sign of life for {SILENT_S:g} s. Its own output says why"
                )

    def _without_store(self, error: Exception) -> PlanError:
        return PlanError(
            f"the plans of ranks {named(self.ranks)} cannot be compared, since the store that the "
            f"processes share does not answer ({error}): has the process that holds it, most often "
            "rank 0, ended? Its own output says why"
        )


def _wait(store: Any, key: str, seconds: float) -> None:
    """Wait a moment for a key; whether it came, or the store has gone, is seen afterwards."""
    try:
        store.wait([key], timedelta(seconds=seconds))
    except RuntimeError:  # DistStoreError of a TCPStore; a FileStore raises a plain one
        return


def named(ranks: Sequence[int]) -> str:
    """Return ranks in words, the first of them if they are many."""
    words = ", ".join(map(str, ranks[:_NUM_NAMED]))
    return words if len(ranks) <= _NUM_NAMED else f"{words} and {len(ranks) - _NUM_NAMED} more"


__all__ = ["Exchange", "named"]
