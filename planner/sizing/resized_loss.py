"""A ``loss_fn`` whose own targets follow the batch: ``lambda y: cross_entropy(y, labels)``.

Tensors in its closure, its defaults or the arguments of a ``functools.partial`` are
resized by the sample's rule. Tensors from elsewhere (module globals, attributes of
objects) keep their size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

from graph_capture.calls.call_spec import TensorSpec, changed, describe, realize, tensors_of
from graph_capture.loop.loss import LossFn

Resize = Callable[[TensorSpec], TensorSpec]


def resized_loss(loss_fn: LossFn | None, resize: Resize) -> LossFn | None:
    """``loss_fn`` with its own tensors resized; ``loss_fn`` itself if none changes.

    The new tensors are uninitialized: only their shapes matter, and memory that nobody
    writes to is not taken from the machine.
    """
    if isinstance(loss_fn, functools.partial):
        inner = resized_loss(loss_fn.func, resize)
        assert inner is not None
        args, keywords = _resized(loss_fn.args, resize), _resized(loss_fn.keywords, resize)
        return functools.partial(inner, *args, **keywords)
    if not isinstance(loss_fn, FunctionType):
        return loss_fn
    cells = tuple(_resized_cell(cell, resize) for cell in loss_fn.__closure__ or ())
    defaults = _resized(loss_fn.__defaults__, resize)
    keyword_defaults = _resized(loss_fn.__kwdefaults__, resize)
    same_cells = all(a is b for a, b in zip(cells, loss_fn.__closure__ or (), strict=True))
    same_defaults = defaults is loss_fn.__defaults__ and keyword_defaults is loss_fn.__kwdefaults__
    if same_cells and same_defaults:
        return loss_fn
    twin = FunctionType(
        loss_fn.__code__, loss_fn.__globals__, loss_fn.__name__, defaults, cells or None
    )
    twin.__kwdefaults__ = keyword_defaults
    return twin


def _resized_cell(cell: CellType, resize: Resize) -> CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return cell
    resized = _resized(content, resize)
    return cell if resized is content else CellType(resized)


def _resized(value: Any, resize: Resize) -> Any:
    """``value`` with new tensors for those whose size changes; ``value`` itself if none does."""
    if all(resize(spec) == spec for spec in map(TensorSpec.of, tensors_of(value))):
        return value
    return realize(changed(describe(value), resize))
