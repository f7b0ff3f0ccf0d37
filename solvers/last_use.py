"""How long a storage, or a new run of an operator, can still matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import (
    GraphArrays,
    IntArray,
)


@dataclass(frozen=True)
class LastUse:
    """Up to when things can matter, by base position.

    ``storage[k]``: last base operator that reads k, or that needs, directly or
    not, something which is recomputed from k; ``operator[f]``: the same for a
    new run of f, -1 for pinned operators.
    """

    storage: IntArray
    operator: IntArray


def find_last_use(g: GraphArrays) -> LastUse:
    """One pass from the back."""
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
