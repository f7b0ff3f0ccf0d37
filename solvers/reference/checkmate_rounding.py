"""Two-phase rounding of Checkmate's relaxation.

Jain et al., MLSys 2020 (arXiv:1910.02653), Section 5: S is rounded, then R is
the least that completes it,

    while S[t+1,k] > R[t,prod(k)] + S[t,k] for some t, k:      R[t,prod(k)] = 1
    while R[t,i] > R[t,prod(k)] + S[t,k] for some k ∈ in(i):   R[t,prod(k)] = 1

with R[t,t] = 1 from the beginning. S is rounded at thresholds (one half in the
paper, 0.1 to 0.9 in its code), and at random: 1 with probability S. Equal roundings
are completed once.

What the paper does not have: runs whose results nobody reads are removed; what a
pinned operator makes cannot be made again, so its S is 1 wherever it is asked for
later; kept storages are always there. Nothing is said about memory, which replay
judges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..arrays import GraphArrays
from ..schedule import Schedule
from ..slices.schedule import trim
from ..stages import order_of
from .checkmate_model import CheckmateModel
from .ortools_programs import ALWAYS

THRESHOLDS = (0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)
NUM_RANDOM = 20


def rounded_schedules(
    g: GraphArrays,
    model: CheckmateModel,
    values: NDArray[np.float64],
    rng: np.random.Generator,
) -> Iterator[Schedule]:
    """The schedules of :data:`THRESHOLDS`, then of :data:`NUM_RANDOM` random roundings."""
    stays = np.zeros(model.s_col.shape)
    stays[model.s_col == ALWAYS] = 1.0
    real = model.s_col >= 0
    stays[real] = np.clip(values[model.s_col[real]], 0.0, 1.0)
    known: set[bytes] = set()
    drawn = (rng.random(stays.shape) < stays for _ in range(NUM_RANDOM))
    for rounded in itertools.chain((stays > least for least in THRESHOLDS), drawn):
        if (key := np.packbits(rounded).tobytes()) not in known:
            known.add(key)
            yield complete(g, rounded)


def complete(g: GraphArrays, stays: NDArray[np.bool_]) -> Schedule:
    """The schedule of the least R for ``stays[t, k]``, from the last stage to the first."""
    num = g.num_operators
    stays = stays.copy()
    made_once = (g.producer >= 0) & ((g.kept > 0) | (g.pinned[g.producer] > 0))
    stages: list[set[int]] = [set() for _ in range(num)]
    for t in range(num - 1, -1, -1):
        runs = {t}
        for k in np.flatnonzero(stays[t + 1]):
            if not stays[t, k] and g.producer[k] < t:
                _ask(stays, runs, made_once, g, t, int(k))
        for i in range(t, -1, -1):  # in base order every input comes earlier
            if i not in runs:
                continue
            for k in g.inputs(i):
                if not stays[t, k]:
                    _ask(stays, runs, made_once, g, t, int(k))
        stages[t] = runs - {t}
    return trim(g, order_of(stages))


def _ask(
    stays: NDArray[np.bool_],
    runs: set[int],
    made_once: NDArray[np.bool_],
    g: GraphArrays,
    t: int,
    k: int,
) -> None:
    """Make ``k`` in stage ``t``; if it can be made only once, let it stay until then."""
    producer = int(g.producer[k])
    if made_once[k] and producer < t:
        stays[t, k] = True
    else:
        runs.add(producer)
