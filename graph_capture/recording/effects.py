"""Side effects of forward, and how a planned step reproduces or refuses them.

A planned step runs a graph, not the code of forward. A tensor or a plain value that
forward puts into an attribute of a module is put there after each planned step. Any
other change to attributes, lists, dicts, closures and globals is refused while
planning, with its line.
"""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calls.call_spec import TensorSpec
from ..errors import NotFittingError
from ..private_torch.fake_tensors import FakeTensor
from ..reads.ledger import Change, Ledger
from ..reads.reading import Watcher
from ..reads.snapshots import (
    ABSENT,
    ATOMS,
    BY_VALUE,
    CONTAINERS,
    Atom,
    Content,
    Snapshot,
    brief,
    difference,
    snapshot,
)
from ..values.asked_numbers import AskedNumber
from .outputs import tensors_within
from .recorder import Recorder

_TABLES = tuple(vars(nn.Module()))


@dataclass(frozen=True, slots=True)
class LeftTensor:
    """A tensor that forward puts into an attribute of a module.

    Parameters
    ----------
    target
        Name of the attribute.
    tensor
        Its stand-in. It requires grad only if forward has read it back from there, as old
        reparametrizations (``nn.utils.weight_norm``, pruning) do.
    is_number
        Whether the attribute gets the number in the tensor instead of the tensor.
    """

    target: str
    tensor: torch.Tensor
    is_number: bool = False


@dataclass(frozen=True, slots=True)
class LeftValue:
    """A plain value that forward puts into an attribute of a module in every call.

    Parameters
    ----------
    target
        Name of the attribute.
    value
        The value, which is the same in every call like the planned one.
    """

    target: str
    value: Any


class Effects:
    """Compares the contents of modules, arguments and other objects before and after forward.

    Parameters
    ----------
    model
        The model, which already holds its stand-ins.
    arguments
        Containers and objects that forward is called with.
    watcher
        Has seen what forward read.
    recorder
        Has seen what forward computed.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: Any,
        objects: Iterable[Any],
        watcher: Watcher,
        recorder: Recorder,
    ) -> None:
        self._model = model
        self._modules = {id(vars(m)): (path, m) for path, m in model.named_modules()}
        self._tables = {id(vars(m).get(n)) for m in model.modules() for n in _TABLES} - {id(None)}
        hooks = [n for n in _TABLES if n.endswith("hooks")]
        self._hooks = {id(vars(m).get(n)) for m in model.modules() for n in hooks} - {id(None)}
        self._arguments, self._objects = arguments, list(objects)
        self._watcher, self._recorder = watcher, recorder
        self._ledger = self._remember()

    def _remember(self) -> Ledger:
        ledger = Ledger()
        for path, module in self._modules.values():
            ledger.attributes(module, path)
        ledger.contents(self._arguments, "arguments")
        for argument in self._objects:
            ledger.attributes(argument, type(argument).__name__)
        return ledger

    def _changes(self, ledger: Ledger) -> list[Change]:
        found = [c for c in ledger.changes() if id(c.holder) not in self._tables]
        return [c for c in found if not (id(c.holder) in self._modules and c.key in _TABLES)]

    def left_tensors(self) -> list[LeftTensor]:
        """Tensors to be put into attributes after each step.

        Raises
        ------
        NotFittingError
            Names the first change that a planned step would not make, and its line.
        """
        self._refuse_kept_by_functions()
        found = []
        for change in [*self._changes(self._ledger), *self._watcher.outside.changes()]:
            held = self._results_in(change.now)
            path, module = self._modules.get(id(change.holder), (None, None))
            if isinstance(change.now, AskedNumber) and module is not None:
                found.append(self._left_number(change, module, path or ""))
            elif held and module is not None and isinstance(change.now, torch.Tensor):
                target = f"{path}.{change.key}" if path else str(change.key)
                if self._is_carried_out(change, module, target):
                    found.append(LeftTensor(target, change.now))
            elif held and not all(map(self._recorder.is_known, held)):
                first = "if only its first call does so, run the model once before planning; "
                raise NotFittingError(
                    f"forward leaves a tensor in {self._name(change)!r} "
                    f"({self._recorder.source_of(held[0])}), which a planned step would not do: "
                    "return it from forward and keep it in the training loop, or in a buffer; "
                    f"{first if change.before is ABSENT else ''}if nobody needs it after the "
                    "call, restore the old value before forward ends, or let a module around "
                    "this one do so"
                )
            elif change.label.startswith("arguments"):
                raise NotFittingError(
                    f"forward changes its argument: {self._name(change)!r} is {brief(change.now)} "
                    f"afterwards, was {brief(change.before)}, and a planned step would not do "
                    "that; change a copy"
                )
        return found

    def _refuse_kept_by_functions(self) -> None:
        """Refuse what a cached function would not compute again, but for constants."""
        for function, kept in self._watcher.caches.kept_stand_ins(self._watcher.cached):
            made = [t for t in kept if self._recorder.has_made(t)]
            unknown = [t for t in made if not self._recorder.is_known(t)]
            if unknown:
                name = getattr(function, "__qualname__", "a function")
                raise NotFittingError(
                    f"{name} keeps a tensor that its first call makes "
                    f"({self._recorder.source_of(unknown[0])}) in a cache (functools.lru_cache), "
                    "so that a second step does something else than the first; run the model once "
                    "before planning"
                )

    def settle_numbers(self) -> None:
        """Keep the numbers that forward has put into attributes until the end of the step."""
        for change in self._changes(self._ledger):
            if isinstance(change.now, AskedNumber):
                change.now.settle()

    def _left_number(self, change: Change, module: nn.Module, path: str) -> LeftTensor:
        number, target = change.now, f"{path}.{change.key}".lstrip(".")
        if self._watcher.was_read(module, change.key):
            raise NotFittingError(
                f"forward finds {brief(change.before)} in attribute {target!r} and leaves a number "
                "of the step there, so that its next call does something else; keep it in a "
                "buffer, as a tensor"
            )
        assert number.copy is not None
        return LeftTensor(target, number.copy, is_number=True)

    def _results_in(self, value: Any) -> list[torch.Tensor]:
        """Tensors in ``value`` that the step has made; ``nn.LSTM``'s list of weights has none."""
        return [
            t
            for t in tensors_within(value)
            if isinstance(t, FakeTensor) and not self._recorder.is_state(t)
        ]

    def _is_carried_out(self, change: Change, module: nn.Module, target: str) -> bool:
        new, old = change.now, change.before
        line = self._recorder.source_of(new)
        if new.requires_grad and not self._watcher.was_used(module, change.key):
            raise NotFittingError(
                f"forward leaves a tensor that requires grad in attribute {target!r} ({line}), "
                "through which a later step or a loss would reach into this one; return it from "
                "forward, or detach it"
            )
        if not self._watcher.was_read(module, change.key):
            return True  # the old value does not matter
        if not isinstance(old, torch.Tensor):
            if self._recorder.is_known(new):
                return False  # a cache of constants: made again in each planned step
            raise NotFittingError(
                f"forward finds {brief(old)} in attribute {target!r} and leaves a tensor there "
                f"({line}), so that its second call does something else than its first; run the "
                "model once before planning, or return the tensor from forward"
            )
        if (new.shape, new.dtype, new.stride()) != (old.shape, old.dtype, old.stride()):
            raise NotFittingError(
                f"forward replaces attribute {target!r}, a {TensorSpec.of(old)}, by a "
                f"{TensorSpec.of(new)} ({line}); each step would need another plan. "
                "If only the first call does so, run the model once before"
            )
        return True

    def _name(self, change: Change) -> str:
        holder, key, label = change.holder, change.key, change.label
        if (not key or label.endswith(f".{key}")) and id(holder) not in self._modules:
            return label
        if id(holder) in self._modules:
            return f"{label}.{key}" if label else str(key)
        if key == label or isinstance(holder, (list, deque, set, types.CellType)):
            return label
        return f"{label}[{key!r}]" if isinstance(holder, dict) else f"{label}.{key}"

    # -- plain values ------------------------------------------------------------

    def plain_changes(self) -> list[Change]:
        """Changes that involve no tensor and leave a value other than before."""
        return [
            c for c in [*self._changes(self._ledger), *self._watcher.outside.changes()] if _plain(c)
        ]

    def settle(self, call_again: Callable[[], None]) -> tuple[list[LeftValue], list[Change]]:
        """Plain values to be put into attributes after each step, and changes that forward reads.

        Parameters
        ----------
        call_again
            Runs forward once more.

        Raises
        ------
        NotFittingError
            When a second call changes them again.
        """
        first = self.plain_changes()
        rewritten = self._rewritten({(id(c.holder), c.key) for c in first})
        if not first:
            return rewritten, []
        between = self._remember()
        outside = self._watcher.outside.as_now()
        call_again()
        again = {
            (id(c.holder), c.key if isinstance(c.holder, dict) else None)
            for c in [*self._changes(between), *outside.changes()]
            if _plain(c)
        }
        left, read = rewritten, []
        hooked = any(
            id(c.holder) in self._hooks for c in self._ledger.changes()
        )  # forward put a hook somewhere: its flags can be set again, but not the hook
        for change in first:
            key = change.key if isinstance(change.holder, dict) else None
            if (id(change.holder), key) in again:
                name = self._name(change)
                raise NotFittingError(
                    f"forward counts in attribute {name!r}, or changes it otherwise in every call, "
                    "and a plan would repeat what it computed from one value for ever; keep it in "
                    "a buffer, or change it in the training loop"
                )
            path, module = self._modules.get(id(change.holder), ("", None))
            if module is None or self._watcher.was_read(module, str(change.key)):
                if not hooked:
                    read.append(change)
            elif change.now is not ABSENT and _is_plain(snapshot(change.now)):
                target = f"{path}.{change.key}" if path else str(change.key)
                left.append(LeftValue(target, copy.deepcopy(change.now)))
        return left, read

    def _rewritten(self, changed: set[tuple[int, Any]]) -> list[LeftValue]:
        """Attributes into which forward puts the value that they have already."""
        return [
            LeftValue(f"{path}.{name}" if path else name, copy.deepcopy(value))
            for path, module in self._modules.values()
            for name, value in vars(module).items()
            if self._watcher.was_written(module, name)
            and not self._watcher.was_read(module, name)
            and (id(vars(module)), name) not in changed
            and name not in _TABLES
            and _is_plain(snapshot(value))
        ]

    def refuse_in_backward(self, before: tuple[Ledger, Ledger]) -> None:
        """Refuse a backward that leaves something that forward had not left.

        Parameters
        ----------
        before
            What was :meth:`remembered` after forward.

        Raises
        ------
        NotFittingError
            Names the first thing that it leaves, and its line.
        """
        inside, outside = before
        for change in [*self._changes(inside), *outside.changes()]:
            held = self._results_in(change.now)
            if held or _plain(change):
                line = f" ({self._recorder.source_of(held[0])})" if held else ""
                raise NotFittingError(
                    f"backward changes {self._name(change)!r}{line}, in a hook or in a custom "
                    "autograd.Function, and a planned step would not do that; do it in the "
                    "training loop"
                )

    def remembered(self) -> tuple[Ledger, Ledger]:
        """The current contents of modules and arguments, and those of everything else."""
        return self._remember(), self._watcher.outside.as_now()


def _plain(change: Change) -> bool:
    """Whether a change leaves another value; two objects of one class count as the same."""
    if tensors_within(change.now):
        return False
    if not isinstance(change.now, (*ATOMS, *CONTAINERS)) and change.now is not ABSENT:
        return type(change.now) is not type(change.before)
    return difference(snapshot(change.before), change.now, "") is not None


def _is_plain(held: Snapshot) -> bool:
    if isinstance(held, Content):
        return held.items is not None and all(map(_is_plain, held.items))
    return isinstance(held, Atom) and isinstance(held.value, (*BY_VALUE, torch.dtype, torch.device))
