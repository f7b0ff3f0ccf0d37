"""The largest batch that a trainer's data can give, where that is cheap to tell."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from graph_capture.reads.isolation import generator_states, set_generator_states

logger = logging.getLogger(__name__)

MAX_ROWS = 200_000
"""Data sets with more rows are not looked through."""


def largest_batch(loader: Any, batch_size: int) -> Mapping[str, Any] | None:
    """Collate the longest rows of a data set, without disturbing what the loop will draw.

    Parameters
    ----------
    loader
        A ``DataLoader`` over a ``datasets.Dataset``, whose columns have their lengths
        at hand; of another one nothing is known.
    batch_size
        Rows of a batch.

    Returns
    -------
    Mapping or None
        What the loader's collator makes of the longest row of each column, and of the row
        that is longest in all. ``None`` where nothing is known.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    rows = _longest_rows(dataset)
    if not rows or collate is None:
        return None
    try:
        collate = copy.deepcopy(collate)  # which may draw from a generator of its own
    except (TypeError, RuntimeError, NotImplementedError) as error:
        logger.debug("a %s cannot be copied: %s", type(collate).__name__, error)
        return None
    states, numpys, pythons = generator_states(), np.random.get_state(), random.getstate()
    try:
        batch = collate([dataset[rows[i % len(rows)]] for i in range(batch_size)])
    finally:
        set_generator_states(states)
        np.random.set_state(numpys)
        random.setstate(pythons)
    return batch if isinstance(batch, Mapping) else None


def is_larger(batch: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
    """Whether a batch has the tensors of another one, none smaller, and one larger."""
    found, other = _shapes(batch), _shapes(than)
    if found.keys() != other.keys() or found == other:
        return False
    return all(
        len(found[name]) == len(other[name])
        and all(a >= b for a, b in zip(found[name], other[name], strict=True))
        for name in found
    )


def _longest_rows(dataset: Any) -> list[int]:
    lengths = _lengths(dataset)
    if not lengths:
        return []
    total = np.sum(list(lengths.values()), axis=0)
    rows = [int(total.argmax()), *(int(found.argmax()) for found in lengths.values())]
    return list(dict.fromkeys(rows))


def _lengths(dataset: Any) -> dict[str, np.ndarray]:
    """Lengths of the lists of each column that has lists, in a ``datasets.Dataset``."""
    features, as_arrow = getattr(dataset, "features", None), getattr(dataset, "with_format", None)
    if not isinstance(features, Mapping) or as_arrow is None or not hasattr(dataset, "__len__"):
        return {}
    if not 0 < len(dataset) <= MAX_ROWS:
        return {}
    import pyarrow
    from pyarrow import compute

    table = as_arrow("arrow")[:]
    found = {}
    for name in table.column_names:
        kind = table.schema.field(name).type
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            lengths = compute.list_value_length(table.column(name)).to_numpy(zero_copy_only=False)
            found[name] = np.nan_to_num(lengths.astype(float))
    return found


def _shapes(batch: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in batch.items() if isinstance(value, torch.Tensor)}


__all__ = ["MAX_ROWS", "is_larger", "largest_batch"]
