"""OR-tools in a process of its own: started, listened to, and ended in time.

OR-tools 9.15 and highspy 1.15 cannot be loaded into one process: both bring
HiGHS, and whichever comes second finds the other's symbols. The package uses
highspy, so OR-tools runs as a child, ``reference/ortools_worker.py``, which is started
as a file (``python -P …/ortools_worker.py``; no ``multiprocessing``, whose
children import the user's main module again).

What holds, however a solve ends:

- The child is gone when :func:`run_ortools` returns or raises. It is asked to
  stop at the time limit and killed a tenth of the limit later (at least
  :data:`LEAST_GRACE_S`). Starting it costs some 0.4 to 0.8 s of the limit.
- If this process is killed, the child notices within a moment and ends.
- A child that dies (out of memory, a crash in a library) becomes an outcome
  ``DIED`` with its signal and last words; solutions that it sent count.
- What OR-tools refuses, or does not have, is raised.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .ortools_programs import ConstraintProgram, MixedIntegerProgram

WORKER = Path(__file__).with_name("ortools_worker.py")

BACKENDS = ("highs", "scip", "cp_sat", "gurobi")
"""MathOpt's solvers for mixed-integer programs that can be asked for."""

GRACE_SHARE = 0.1
LEAST_GRACE_S = 0.5

MISSING = "this solver needs OR-tools: pip install 'ortools>=9.15,<10'"


class BackendUnavailableError(RuntimeError):
    """The solver that was asked for is not installed or has no licence."""


class RunStatus(StrEnum):
    """How a run of OR-tools ended."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"  # neither a solution nor a proof that there is none
    FAILED = "failed"  # the solver gave up (numerical trouble): no bound is believed
    STOPPED = "stopped"  # by the caller's wish
    KILLED = "killed"  # it did not end at the time limit
    DIED = "died"  # on its own


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """What a run came to.

    Parameters
    ----------
    values
        Of all columns, in the best solution; ``None`` when there is none.
    objective, bound
        In the program's own units; ``bound`` is the dual bound.
    message
        The solver's word, or why the child is gone.
    """

    status: RunStatus
    values: NDArray[np.float64] | None
    objective: float | None
    bound: float | None
    message: str


def run_ortools(
    program: MixedIntegerProgram | ConstraintProgram,
    *,
    time_limit_s: float,
    seed: int = 0,
    workers: int = 1,
    backend: str = "highs",
    absolute_gap: float = 0.0,
    on_solution: Callable[[NDArray[np.float64]], object] | None = None,
    on_start: Callable[[int], object] | None = None,
    stop: Callable[[], bool] | None = None,
    worker: Path = WORKER,
) -> RunOutcome:
    """Solve ``program`` in a child process.

    Parameters
    ----------
    time_limit_s
        Wall clock, the child's start included.
    backend
        One of :data:`BACKENDS`, ``"glop"`` or ``"pdlp"`` (without integers);
        a :class:`ConstraintProgram` goes to CP-SAT itself.
    absolute_gap
        In units of the objective: a solution this near to the bound ends the run.
    on_solution
        Called with each better solution as it comes (not by HiGHS, whose
        solutions on the way MathOpt does not pass on).
    on_start
        Called with the child's process id.
    stop
        Asked after each event and four times a second.
    worker
        The file that the child runs.

    Raises
    ------
    ModuleNotFoundError
        When OR-tools is not installed.
    BackendUnavailableError
        When the backend is not.
    RuntimeError
        When OR-tools refuses the program.
    """
    if importlib.util.find_spec("ortools") is None:
        raise ModuleNotFoundError(MISSING, name="ortools")
    begin_s = time.time()
    grace_s = max(LEAST_GRACE_S, GRACE_SHARE * time_limit_s)
    request: dict[str, Any] = {
        "kind": "mip" if isinstance(program, MixedIntegerProgram) else "cp",
        "backend": backend,
        "seed": seed % 2**31,
        "workers": max(1, workers),
        "absolute_gap": absolute_gap,
        "stop_at": begin_s + time_limit_s,
        "kill_at": begin_s + time_limit_s + grace_s,
        "parent": os.getpid(),
    }
    arrays: dict[str, NDArray[np.generic]] = {}
    if isinstance(program, MixedIntegerProgram):
        arrays = program.arrays()
    else:
        request["program"] = program.as_json()
    deadline_s = time.monotonic() + time_limit_s + grace_s
    # Files and not pipes: a child that is stuck can then never make its parent wait.
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        np.savez(stdin, allow_pickle=False, request=np.array(json.dumps(request)), **arrays)
        stdin.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-P", str(worker)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C in a terminal is for the parent, which ends the child
        )
        listener = _Listener(child, on_solution, stop or (lambda: False))
        try:
            if on_start is not None:
                on_start(child.pid)
            return listener.listen(deadline_s) or _post_mortem(listener, stderr, time_limit_s)
        finally:
            child.kill()
            child.wait()
            listener.reader.join(timeout=1.0)


class _Listener:
    """Takes a child's events until it is done, gone, or out of time."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        on_solution: Callable[[NDArray[np.float64]], object] | None,
        stop: Callable[[], bool],
    ) -> None:
        self.child, self.on_solution, self.stop = child, on_solution, stop
        self.values: NDArray[np.float64] | None = None
        self.objective: float | None = None
        self.bound: float | None = None
        self.timed_out = False
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def listen(self, deadline_s: float) -> RunOutcome | None:
        """The outcome; ``None`` when the child came to no end of its own."""
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                self.timed_out = True
                return None
            try:
                line = self.lines.get(timeout=min(0.25, left_s))
            except queue.Empty:
                line = b""
            if line is None:
                return None
            if line:
                outcome = self._take(json.loads(line))
                if outcome is not None:
                    return outcome
            if self.stop():
                return self.outcome(RunStatus.STOPPED, "")

    def outcome(self, status: RunStatus, message: str) -> RunOutcome:
        return RunOutcome(
            status=status,
            values=self.values,
            objective=self.objective,
            bound=None if status is RunStatus.FAILED else self.bound,
            message=message,
        )

    def _read(self) -> None:
        assert self.child.stdout is not None
        with self.child.stdout as stdout:
            for line in stdout:
                if line.endswith(b"\n"):  # else it died while it wrote
                    self.lines.put(line)
        self.lines.put(None)

    def _take(self, event: dict[str, Any]) -> RunOutcome | None:
        if event["event"] == "error":
            raise _exception(event)
        if event.get("values") is not None:
            self.values = np.array(event["values"], dtype=np.float64)
            self.objective = event["objective"]
        if event.get("bound") is not None:
            self.bound = max(event["bound"], event["bound"] if self.bound is None else self.bound)
        if event["event"] == "solution" and self.on_solution is not None:
            assert self.values is not None
            self.on_solution(self.values)
        if event["event"] == "done":
            return self.outcome(RunStatus(event["status"]), event["message"])
        return None


def _exception(event: dict[str, Any]) -> Exception:
    message = event["message"]
    if event["kind"] == "missing":
        return ModuleNotFoundError(f"{MISSING} ({message})", name="ortools")
    if event["kind"] == "backend":
        return BackendUnavailableError(
            f"the backend is not available: {message}; choose one of {', '.join(BACKENDS)} "
            "that is installed and licensed"
        )
    return RuntimeError(f"OR-tools: {message}")


def _post_mortem(listener: _Listener, stderr: IO[bytes], time_limit_s: float) -> RunOutcome:
    """The outcome of a child that did not say ``done``."""
    if listener.timed_out:
        return listener.outcome(
            RunStatus.KILLED, f"OR-tools did not stop at its limit of {time_limit_s:.1f} s: killed"
        )
    try:
        code = listener.child.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return listener.outcome(RunStatus.DIED, "OR-tools' process fell silent: killed")
    stderr.seek(0)
    words = stderr.read().decode(errors="replace").strip().splitlines()
    if code < 0:
        name = signal.Signals(-code).name
        reason = f"was ended by {name}"
        if name == "SIGKILL":
            reason += " (out of memory, most often; solver='auto' needs no such process)"
    else:
        reason = f"ended with code {code}"
    if words:
        reason += f": {words[-1]}"
    return listener.outcome(RunStatus.DIED, f"OR-tools' process {reason}")
