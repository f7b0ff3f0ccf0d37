from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from solvers.reference.ortools_process import BackendUnavailableError, RunStatus, run_ortools
from solvers.reference.ortools_programs import (
    ABSENT,
    ALWAYS,
    ConstraintProgram,
    LinearBuilder,
    MixedIntegerProgram,
)
from solvers.reference.ortools_worker import HIGHS_TABLE


def knapsack() -> MixedIntegerProgram:
    """Cover 10 with weights 6, 5, 4, 3 at costs 7, 5.5, 5, 4: the first and the third, at 12."""
    builder = LinearBuilder()
    columns = [builder.column(cost=cost, integer=True) for cost in (7.0, 5.5, 5.0, 4.0)]
    builder.row(list(zip(columns, (6.0, 5.0, 4.0, 3.0), strict=True)), lower=10.0)
    return builder.build({columns[0]: 1.0})


def market_split() -> MixedIntegerProgram:
    """Six equations in fifty binaries: no solver is done with it in a minute."""
    rng = np.random.default_rng(0)
    builder = LinearBuilder()
    columns = [builder.column(integer=True) for _ in range(50)]
    for _ in range(6):
        weights = rng.integers(0, 100, size=len(columns))
        slack = [builder.column(cost=1.0, upper=1e4) for _ in range(2)]
        half = float(weights.sum() // 2)
        terms = [(c, float(w)) for c, w in zip(columns, weights, strict=True)]
        builder.row([*terms, (slack[0], 1.0), (slack[1], -1.0)], lower=half, upper=half)
    return builder.build({})


def is_gone(pid: int) -> bool:
    """Whether there is no such process, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def worker(tmp_path: Path, body: str) -> Path:
    """A child that does something else."""
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(body))
    return path


@pytest.mark.parametrize("backend", ["highs", "scip", "cp_sat"])
def test_solves_a_program(backend: str) -> None:
    """Each backend finds the optimum of a knapsack and proves it."""
    outcome = run_ortools(knapsack(), time_limit_s=20, backend=backend)
    assert outcome.status is RunStatus.OPTIMAL
    assert outcome.objective == pytest.approx(12.0)
    assert outcome.bound == pytest.approx(12.0)
    assert outcome.values is not None
    assert [round(x) for x in outcome.values] == [1, 0, 1, 0]


def test_solves_a_constraint_program() -> None:
    """Two unit tasks that do not fit side by side, one of them optional: it is left out."""
    program = ConstraintProgram()
    start, present = program.between(0, 1), program.literal()
    first = program.interval((ABSENT, 0), (ABSENT, 2), (ABSENT, 2), ALWAYS)
    second = program.interval((start, 0), (ABSENT, 1), (start, 1), present)
    program.cumulative([first, second], [2, 2], (ABSENT, 3))
    program.at_least((((start, 0), 1),), 1, [present])
    program.objective = [(start, 1), (present, -5)]
    seen: list[float] = []
    outcome = run_ortools(
        program, time_limit_s=20, on_solution=lambda values: seen.append(values[start])
    )
    assert outcome.status is RunStatus.OPTIMAL
    assert outcome.objective == 0.0
    assert outcome.values is not None
    assert list(outcome.values) == [0.0, 0.0]
    assert seen[-1] == 0.0


def test_says_that_nothing_satisfies_a_program() -> None:
    """A row that cannot hold is proven infeasible."""
    builder = LinearBuilder()
    builder.row([(builder.column(integer=True), 1.0)], lower=2.0)
    outcome = run_ortools(builder.build({}), time_limit_s=20)
    assert outcome.status is RunStatus.INFEASIBLE
    assert outcome.values is None


def test_reads_bounds_off_a_table_of_nodes() -> None:
    """Of HiGHS' lines those with a finite dual bound count, and nothing else that is printed."""
    lines = [
        " J       0       0         0   0.00%   -inf            12.5               Large        0      0      0         0     0.0s",  # noqa: E501
        "         0       0         0   0.00%   7.402597403     12.5              40.78%        0      0      0         3     0.0s",  # noqa: E501
        " T     121      25        41  35.12%   9.25            12.5              26.00%        0      0      0         3     0.1s",  # noqa: E501
        "        Src  Proc. InQueue |  Leaves   Expl. | BestBound       BestSol              Gap |",
    ]
    found = [HIGHS_TABLE.match(line) for line in lines]
    assert [match[1] for match in found if match] == ["7.402597403", "9.25"]


def test_a_killed_child_is_an_outcome() -> None:
    """SIGKILL, as the system sends it where memory ends, is named in the message."""
    pids: list[int] = []

    def kill(pid: int) -> None:
        pids.append(pid)
        os.kill(pid, signal.SIGKILL)

    outcome = run_ortools(knapsack(), time_limit_s=20, on_start=kill)
    assert outcome.status is RunStatus.DIED
    assert "SIGKILL (out of memory, most often; solver='auto'" in outcome.message
    assert is_gone(pids[0])


def test_a_crashed_child_leaves_its_solutions(tmp_path: Path) -> None:
    """What it sent before it ended counts, half a line does not, its last words are told."""
    path = worker(
        tmp_path,
        """
        import sys
        print('{"event": "solution", "objective": 7.0, "values": [1, 0]}')
        print('{"event": "bound", "bound": 3.0}')
        print('{"event": "done", "sta', end="")
        sys.stdout.flush()
        sys.exit("the library gave up")
        """,
    )
    outcome = run_ortools(knapsack(), time_limit_s=20, worker=path)
    assert outcome.status is RunStatus.DIED
    assert outcome.message == "OR-tools' process ended with code 1: the library gave up"
    assert outcome.values is not None
    assert list(outcome.values) == [1.0, 0.0]
    assert (outcome.objective, outcome.bound) == (7.0, 3.0)


def test_a_solve_stops_at_its_limit() -> None:
    """A program that nobody solves in time is left with a solution and a bound."""
    begin_s = time.monotonic()
    outcome = run_ortools(market_split(), time_limit_s=3.0)
    assert time.monotonic() - begin_s <= 20, "it would not have stopped by itself for long"
    assert outcome.status is RunStatus.FEASIBLE
    assert outcome.objective is not None
    assert outcome.bound is not None


def test_a_child_that_hangs_is_killed() -> None:
    """A stopped process cannot obey; half a second after its limit it is gone."""
    pids: list[int] = []

    def freeze(pid: int) -> None:
        pids.append(pid)
        os.kill(pid, signal.SIGSTOP)

    begin_s = time.monotonic()
    outcome = run_ortools(knapsack(), time_limit_s=0.5, on_start=freeze)
    assert 1.0 <= time.monotonic() - begin_s <= 20
    assert outcome.status is RunStatus.KILLED
    assert is_gone(pids[0])


def test_the_caller_can_stop_it() -> None:
    """A run ends when ``stop`` says so."""
    begin_s = time.monotonic()
    outcome = run_ortools(market_split(), time_limit_s=60, stop=lambda: True)
    assert outcome.status is RunStatus.STOPPED
    assert time.monotonic() - begin_s <= 20


def test_ctrl_c_leaves_no_child() -> None:
    """An interrupt reaches the caller, and the child is gone by then."""
    pids: list[int] = []
    # a shell starts what it puts in the background with the signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt_soon(pid: int) -> None:
        pids.append(pid)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    try:
        with pytest.raises(KeyboardInterrupt):
            run_ortools(market_split(), time_limit_s=60, on_start=interrupt_soon)
    finally:
        signal.signal(signal.SIGINT, before)
    assert is_gone(pids[0])


def test_an_error_of_the_caller_leaves_no_child() -> None:
    """When what is called with a solution raises, the child is ended all the same."""
    pids: list[int] = []

    def refuse(values: np.ndarray) -> None:
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        run_ortools(
            knapsack(),
            time_limit_s=20,
            backend="scip",
            on_start=pids.append,
            on_solution=refuse,
        )
    assert is_gone(pids[0])


def test_the_child_of_a_killed_process_ends() -> None:
    """When its parent is gone, nobody could end it; it does so itself."""
    script = """
        import tests.solvers.test_ortools_process as here
        tell = lambda pid: print(pid, flush=True)
        here.run_ortools(here.market_split(), time_limit_s=60, on_start=tell)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(1.5)
        assert not is_gone(pid)
        parent.kill()
        deadline_s = time.monotonic() + 5
        while not _has_ended(pid) and time.monotonic() < deadline_s:
            time.sleep(0.1)
    assert _has_ended(pid)


def _has_ended(pid: int) -> bool:
    """Gone, or a zombie that whoever adopted it has not looked at yet."""
    status = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return is_gone(pid)
    try:
        return status.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without OR-tools the error is the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'ortools"):
        run_ortools(knapsack(), time_limit_s=20)


@pytest.mark.skipif(
    shutil.which("gurobi_cl") is not None or importlib.util.find_spec("gurobipy") is not None,
    reason="Gurobi is there",
)
def test_says_that_a_backend_is_missing() -> None:
    """Gurobi, where it is not installed, is an error and no other solver's turn."""
    with pytest.raises(BackendUnavailableError, match="gurobi"):
        run_ortools(knapsack(), time_limit_s=20, backend="gurobi")


def test_passes_on_what_is_refused() -> None:
    """A cost that is no number is OR-tools' to refuse, in its own words."""
    builder = LinearBuilder()
    builder.column(cost=float("nan"))
    with pytest.raises(RuntimeError, match="OR-tools: "):
        run_ortools(builder.build({}), time_limit_s=20)
