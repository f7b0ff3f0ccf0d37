"""Take a model's output apart into tensors, and rebuild it from others.

Known containers go through torch's pytree. Any other object that holds tensors (a
key-value cache, a dataclass, an object with slots) is copied with the new tensors in
place of the old ones; modules that it holds are not copied.
"""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import NotFittingError
from ..private_torch.trees import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten
from ..reads.ledger import slots_of
from ..values.asked_numbers import AskedNumber

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code defines


@dataclass(frozen=True, slots=True)
class Number:
    """A leaf that is the number in a tensor."""

    index: int


@dataclass(frozen=True)
class OutputTemplate:
    """How to rebuild an output from its tensors.

    ``leaves`` are pytree leaves; ``slots[i]`` is the index of leaf ``i``'s
    tensor, a dict from ids to indices for an opaque object, a :class:`Number`,
    or ``None`` for a constant. ``names`` are the tensors' places in the output, for messages.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]
    slots: tuple[int | dict[int, int] | Number | None, ...]
    names: tuple[str, ...]

    def build(
        self,
        tensors: list[torch.Tensor],
        number: Callable[[torch.Tensor], Any] = torch.Tensor.item,
    ) -> Any:
        """Rebuild the output with ``tensors`` in place of the original ones."""
        rebuilt = []
        for leaf, slot in zip(self.leaves, self.slots, strict=True):
            if slot is None:  # the caller may change an array
                rebuilt.append(leaf.copy() if isinstance(leaf, np.ndarray) else leaf)
            elif isinstance(slot, int):
                rebuilt.append(tensors[slot])
            elif isinstance(slot, Number):
                rebuilt.append(number(tensors[slot.index]))
            else:
                rebuilt.append(_copied(leaf, {key: tensors[i] for key, i in slot.items()}))
        return tree_unflatten(rebuilt, self.spec)


def take_apart(output: Any) -> tuple[OutputTemplate, list[torch.Tensor]]:
    """Return the template of ``output`` and its tensors, each once."""
    tensors: list[torch.Tensor] = []
    names: list[str] = []
    index_of: dict[int, int] = {}

    def index(tensor: torch.Tensor, name: str) -> int:
        if id(tensor) not in index_of:
            index_of[id(tensor)] = len(tensors)
            tensors.append(tensor)
            names.append(name)
        return index_of[id(tensor)]

    leaves, spec = _flattened(output)
    kept: list[Any] = []
    slots: list[int | dict[int, int] | Number | None] = []
    for name, leaf in leaves:
        if isinstance(leaf, AskedNumber):
            slots.append(None)
            kept.append(leaf)
            continue
        if isinstance(leaf, torch.Tensor):
            slots.append(index(leaf, name or "output"))
            kept.append(None)
            continue
        held = tensors_within(leaf)
        if held:
            _refuse_numbers(leaf)
            _refuse_uncopied(leaf, held)
        slots.append({id(t): index(t, name or "output") for t in held} if held else None)
        kept.append(leaf)
    for i, (name, leaf) in enumerate(leaves):
        if isinstance(leaf, AskedNumber):  # last, so that tensors have the same indices in eager
            assert leaf.copy is not None
            slots[i], kept[i] = Number(index(leaf.copy, name or "output")), None
    return OutputTemplate(spec, tuple(kept), tuple(slots), tuple(names)), tensors


def _flattened(output: Any) -> tuple[list[tuple[str, Any]], TreeSpec]:
    try:
        leaves, spec = tree_flatten_with_path(output, is_leaf=_is_size)
    except ValueError:  # a container registered without names for its places
        plain, spec = tree_flatten(output, is_leaf=_is_size)
        return [(f"output {i}", leaf) for i, leaf in enumerate(plain)], spec
    return [
        (".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf)
        for path, leaf in leaves
    ], spec


def _is_size(value: Any) -> bool:
    """Whether it is a shape, which pytree would rebuild as a plain tuple."""
    return isinstance(value, torch.Size)


def _copied(leaf: Any, memo: dict[int, Any]) -> Any:
    for item in _within(leaf):
        if isinstance(item, torch.nn.Module):
            memo[id(item)] = item
    try:
        return copy.deepcopy(leaf, memo)
    except LookupError:  # ``__getattr__ = dict.__getitem__``, which copy asks for ``__deepcopy__``
        if not isinstance(leaf, dict):
            raise
    make, given, state, _, items = (*type(leaf).__reduce_ex__(leaf, 4), *[None] * 4)[:5]
    assert callable(make)  # by the protocol of pickles, which ``OrderedDict`` has its own way for
    twin = memo[id(leaf)] = make(*given)
    for key, value in items or ():
        twin[key] = _copied(value, memo)
    attributes = state if isinstance(state, dict) else {}
    vars(twin).update({name: _copied(value, memo) for name, value in attributes.items()})
    return twin


def settle_numbers(output: Any) -> None:
    """Keep an output's numbers until the end of the step."""
    for _, leaf in _flattened(output)[0]:
        if isinstance(leaf, AskedNumber):
            leaf.settle()


def _refuse_numbers(leaf: Any) -> None:
    if any(isinstance(item, AskedNumber) for item in _within(leaf)):
        raise NotFittingError(
            f"an output of type {type(leaf).__name__} holds a number that forward reads out of a "
            "tensor; return it in a tuple or a dict"
        )


def _refuse_uncopied(leaf: Any, held: list[torch.Tensor]) -> None:
    """Refuse an object that cannot be copied with other tensors."""
    what = f"an output of type {type(leaf).__name__} holds tensors"
    advice = "return them in a tuple, a dict or a dataclass"
    others = {id(t): torch.empty(()) for t in held}
    try:
        twin = _copied(leaf, dict(others))
    except (
        *(TypeError, AttributeError, ValueError, LookupError),
        *(copy.Error, pickle.PicklingError),
    ) as error:
        raise NotFittingError(f"{what} and cannot be copied ({error}); {advice}") from error
    if any(id(t) in others for t in tensors_within(twin)):
        raise NotFittingError(f"{what} that its copies share, perhaps in a function; {advice}")


# Bytes and arrays return new copies of themselves whenever they are asked for their parts.
_HOLD_NOTHING = (type, str, int, float, complex, bytes, bytearray, types.ModuleType, np.generic)


def tensors_within(value: Any) -> list[torch.Tensor]:
    """Return the tensors in an object, at any depth but not inside modules."""
    return [item for item in _within(value) if isinstance(item, torch.Tensor)]


def _within(value: Any) -> Iterator[Any]:
    """An object and all that it holds, each once."""
    seen: dict[int, Any] = {}
    todo = [value]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, _HOLD_NOTHING):
            continue
        seen[id(item)] = item
        yield item
        if not isinstance(item, (torch.Tensor, torch.nn.Module)):
            todo.extend(_held_by(item))


def _held_by(item: Any) -> Iterator[Any]:
    if isinstance(item, dict):
        yield from dict.values(item)
    elif isinstance(item, Mapping):
        yield from item.values()
    elif isinstance(item, (list, tuple, set, frozenset)):
        yield from item
    elif isinstance(item, types.FunctionType):
        yield from (cell.cell_contents for cell in item.__closure__ or () if _filled(cell))
    elif isinstance(item, types.MethodType):
        yield item.__self__
    elif isinstance(item, np.ndarray):
        yield from item.ravel().tolist() if item.dtype.hasobject else ()
    elif not type(item).__flags__ & _HEAP_TYPE:
        yield from _state_of(item)
    if hasattr(item, "__dict__"):
        yield from vars(item).values()
    yield from slots_of(item).values()


def _state_of(item: Any) -> Iterator[Any]:
    """The parts that a copy of a C object is made from: a deque's items, a partial's arguments."""
    try:
        parts = item.__reduce_ex__(4)
    except (TypeError, AttributeError, pickle.PicklingError):  # it cannot be copied
        return
    if isinstance(parts, tuple):
        yield from (part for part in parts[1:3] if part is not None)
        yield from (held for part in parts[3:5] if part is not None for held in part)


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def loss_of(output: Any) -> Any:
    """Return an output's ``loss``, or ``None``."""
    try:
        return getattr(output, "loss", None)
    except LookupError:  # a dict that is asked for its items by attribute
        return None


def find_loss(output: Any) -> torch.Tensor | None:
    """Return the scalar that training differentiates: the output itself or its ``loss``."""
    candidate = output if isinstance(output, torch.Tensor) else loss_of(output)
    if isinstance(candidate, torch.Tensor) and candidate.numel() == 1 and candidate.requires_grad:
        return candidate
    return None
