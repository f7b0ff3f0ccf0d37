"""How long a storage, or another run of an operator, can still matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import (
    GraphArrays,
    IntArray,
)


@dataclass(frozen=True)
class LastUse:
    """The last base position at which something can matter.

    ``storage[k]`` is the last base operator that reads k, or that needs, directly or
    not, something recomputed from k. ``operator[f]`` is the same for another run of f;
    -1 for pinned operators.
    """

    storage: IntArray
    operator: IntArray


def find_last_use(g: GraphArrays) -> LastUse:
    """Compute both in one backward pass."""
    storage = np.full(g.num_storages, -1, dtype=np.int64)
    operator = np.full(g.num_operators, -1, dtype=np.int64)
    for v in range(g.num_operators - 1, -1, -1):
        outputs = g.outputs(v)
        if len(outputs) and not g.pinned[v]:
            again = outputs[g.kept[outputs] == 0]
            operator[v] = storage[again].max(initial=-1)
        reach = max(v, int(operator[v]))
        inputs = g.inputs(v)
        storage[inputs] = np.maximum(storage[inputs], reach)
    return LastUse(storage, operator)
