"""Searches are compiled before their clocks start, so a first solve finds what later ones find."""

from __future__ import annotations

import subprocess
import sys

from .graphs import INSTANCES

_IN_A_NEW_PROCESS = """
import sys
from solvers import backward_search, backward_states, local_search
from solvers.arrays import graph_arrays
from solvers.instances import budget_of, load_instance
from solvers.least_memory import least_memory
from solvers.retention_plan import find_gaps

def compiled():
    slow = (local_search._anneal, backward_states.explore, backward_states.enter)
    return [len(function.signatures) for function in slow]

assert compiled() == [0, 0, 0]
graph = load_instance(sys.argv[1])
g = graph_arrays(graph)
local_search.compile_annealing(g, find_gaps(g))
backward_search.compile_backward_search(g)
assert compiled() == [1, 1, 1], compiled()
least_memory(graph, time_limit_s=2)
local_search.local_search(graph, budget_of(graph, 0.7), num_moves=1000)
assert compiled() == [1, 1, 1], compiled()
"""


def test_nothing_slow_is_compiled_under_a_clock() -> None:
    """Annealing and the backward search, in a process in which nothing has run yet."""
    command = [sys.executable, "-c", _IN_A_NEW_PROCESS, str(INSTANCES / "chain32h.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
