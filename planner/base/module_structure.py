"""Record a module's objects, to tell whether a graph traced from it is still valid."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from operator import eq, is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import nn

from graph_capture.private_torch.modules import buffers_of, children_of, parameters_of

_Slot = tuple[weakref.ref[nn.Module], str]  # a module and a name among its parameters or buffers

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


@dataclass(frozen=True, slots=True)
class _Part:
    """One module, as it was recorded.

    Parameters
    ----------
    module
        The module.
    children
        Its children by name, in order.
    kind
        Its class.
    forward
        Identity of what replaces its class's forward in its ``__dict__``; ``None`` for
        nothing.
    hooks
        Registration numbers of its hooks, which PyTorch gives out once each.
    """

    module: weakref.ref[nn.Module]
    children: tuple[tuple[str, weakref.ref[nn.Module] | None], ...]
    kind: type
    forward: int | None
    hooks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Structure:
    """Modules by identity, their hooks, and which tensors are shared under several names.

    Hooks and forward of the root are not part of it: they run around a planned step.

    Parameters
    ----------
    parts
        The modules by their paths.
    tied
        Pairs of places that hold the same parameter or buffer.
    everywhere
        Registration numbers of the hooks on all modules.
    """

    parts: Mapping[str, _Part]
    tied: tuple[tuple[_Slot, _Slot], ...]
    everywhere: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """Record how ``model`` is built, without keeping any of it alive."""
        tied = []
        parts = {path: _part(module, root=not path) for path, module in model.named_modules()}
        first: dict[int, _Slot] = {}
        for module in model.modules():
            for table in (parameters_of(module), buffers_of(module)):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    slot = (weakref.ref(module), name)
                    if first.setdefault(id(tensor), slot) is not slot:
                        tied.append((first[id(tensor)], slot))
        return cls(parts, tuple(tied), _hooks_everywhere())

    def holds(self) -> bool:
        """Whether the model is still built the same way."""
        return self.difference() is None

    def difference(self) -> str | None:
        """The first thing that is not as it was, in words."""
        for path, then in self.parts.items():
            module = then.module()
            if module is None:
                return f"module {path!r} is gone"
            now = _part(module, root=not path)
            if now == then:
                continue
            if now.kind is not then.kind:
                return f"module {path!r} is a {now.kind.__name__}, was a {then.kind.__name__}"
            if now.children != then.children:
                return _another_child(path, then.children, now.children)
            if now.forward != then.forward:
                return f"the forward of module {path!r} was replaced"
            more = sum(map(len, now.hooks)) > sum(map(len, then.hooks))
            return f"a hook was {'put on' if more else 'taken off'} module {path!r}"
        if _hooks_everywhere() != self.everywhere:
            return "a hook on all modules was put on or taken off"
        for (a, name), (b, other) in self.tied:
            if _at((a, name)) is not _at((b, other)):
                return f"two parameters or buffers named {name!r} and {other!r} were one tensor"
        return None


class LiveStructure:
    """Checks quickly whether a live model is still built the same way.

    Keeps the modules alive, as their training loop does. Others may hold on to the modules'
    tables of parameters and buffers: a table in the place of another is a difference.
    """

    def __init__(self, model: nn.Module) -> None:
        self.recorded = Structure.of(model)
        """The same, keeping nothing alive."""
        modules = list(model.modules())
        self._modules, self._kinds = modules, list(map(type, modules))
        below = modules[1:]
        self._attributes = [vars(module) for module in below]
        self._tables = list(map(_TABLES, self._attributes))
        self._own_tables = _OWN_TABLES(vars(model))
        self._forwards = list(map(_FORWARD, self._attributes))
        self._parents = [children_of(m) for m in modules if children_of(m)]
        self._leaves = [children_of(m) for m in modules if not children_of(m)]
        self._children = [tuple(children.values()) for children in self._parents]
        hooks = [
            *chain.from_iterable(map(_HOOK_TABLES, self._attributes)),
            *_global_tables(),
        ]
        self._without_hooks = [table for table in hooks if not table]
        self._with_hooks = [(table, tuple(table)) for table in hooks if table]

    def difference(self) -> str | None:
        """The first thing that is not as it was, in words."""
        with suppress(RuntimeError):  # tables with other tensors, which are no truth values
            if self._unchanged():
                return None
        return self.recorded.difference() or "the table of a module's parts is another one"

    def _unchanged(self) -> bool:
        return (
            not any(self._without_hooks)
            and not any(self._leaves)
            and all(map(is_, map(type, self._modules), self._kinds))
            and all(map(eq, map(tuple, map(dict.values, self._parents)), self._children))
            and all(map(eq, map(_TABLES, self._attributes), self._tables))
            and all(map(is_, _OWN_TABLES(vars(self._modules[0])), self._own_tables))
            and all(map(is_, map(_FORWARD, self._attributes), self._forwards))
            and all(tuple(table) == then for table, then in self._with_hooks)
            and all(_at(a) is _at(b) for a, b in self.recorded.tied)
        )


_TABLES = itemgetter("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_OWN_TABLES = itemgetter("_modules", "_parameters", "_buffers")
_HOOK_TABLES = itemgetter(*_HOOKS)
_FORWARD = methodcaller("get", "forward")


def _part(module: nn.Module, *, root: bool) -> _Part:
    forward = None if root else vars(module).get("forward")
    return _Part(
        module=weakref.ref(module),
        children=tuple(
            (name, None if child is None else weakref.ref(child))
            for name, child in children_of(module).items()
        ),
        kind=type(module),
        forward=None if forward is None else id(forward),
        hooks=() if root else tuple(tuple(getattr(module, name)) for name in _HOOKS),
    )


def _another_child(
    path: str,
    then: Iterable[tuple[str, weakref.ref[nn.Module] | None]],
    now: Iterable[tuple[str, weakref.ref[nn.Module] | None]],
) -> str:
    before, after = dict(then), dict(now)
    prefix = f"{path}." if path else ""
    for name in [*before, *(n for n in after if n not in before)]:
        if name not in after:
            return f"module {prefix + name!r} was removed"
        if name not in before:
            return f"module {prefix + name!r} was added"
        if before[name] != after[name]:
            return f"module {prefix + name!r} was replaced"
    return f"the modules in {path or 'the model'!r} are in another order"


def _global_tables() -> list[dict[int, Any]]:
    return [getattr(torch.nn.modules.module, name) for name in _GLOBAL_HOOKS]


def _hooks_everywhere() -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, _global_tables()))


def _at(slot: _Slot) -> object:
    reference, name = slot
    module = reference()
    if module is None:
        return None
    return parameters_of(module).get(name, buffers_of(module).get(name))
