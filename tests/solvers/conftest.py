from __future__ import annotations

import pytest

from solvers.backward_search import least_memory_bound
from solvers.local_search import local_search

from .graphs import training_chain


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Compile once, so that no test's time limit pays for it."""
    local_search(training_chain(4), 60, num_moves=1000)
    least_memory_bound(training_chain(4))
