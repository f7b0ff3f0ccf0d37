"""Record containers and attributes, to find what changed in them and to undo it.

A container that did not change is not written to: some are read-only (a frozen
configuration, the tables of a TorchScript module).
"""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from operator import is_
from typing import Any

from .snapshots import ABSENT, entries_of

_LISTS = (list, deque)
_SETS = (set,)
LENT: set[int] = set()
"""Ids of functions that a capture has put into users' files, where they do not stay."""


@dataclass(frozen=True, slots=True)
class Change:
    """A place that holds a different object than before.

    Parameters
    ----------
    label
        The container in words, or ``"module.attribute"``.
    holder, key
        The container, and the place in it; an element of a set is its own key.
    before, now
        The two objects; ``ABSENT`` for none.
    """

    label: str
    holder: Any
    key: Any
    before: Any
    now: Any


@dataclass(frozen=True, slots=True)
class _Entry:
    label: str
    container: Any
    saved: Any


@dataclass(frozen=True, slots=True)
class _Slot:
    """A global name, the ``cell_contents`` of a cell, or a context's value of a variable."""

    holder: Any
    key: str

    def get(self) -> Any:
        if isinstance(self.holder, dict):
            return self.holder.get(self.key, ABSENT)
        if isinstance(self.holder, ContextVar):
            return self.holder.get(ABSENT)
        try:
            return self.holder.cell_contents
        except ValueError:  # empty
            return ABSENT

    def set(self, value: Any) -> None:
        if isinstance(self.holder, dict):
            if value is ABSENT:
                self.holder.pop(self.key, None)
            else:
                self.holder[self.key] = value
        elif isinstance(self.holder, ContextVar):
            self.holder.set(None if value is ABSENT else value)
        elif value is not ABSENT:
            self.holder.cell_contents = value


@dataclass(frozen=True, slots=True)
class _Names:
    """The names of a class or of a file, each restored by itself."""

    holder: Any

    def get(self) -> dict[str, Any]:
        table = vars(self.holder) if isinstance(self.holder, type) else self.holder
        # A file that is imported meanwhile stays in its package.
        return {
            name: value
            for name, value in table.items()
            if not name.startswith("__") and not isinstance(value, types.ModuleType)
            if id(value) not in LENT
        }

    def set(self, saved: dict[str, Any]) -> None:
        now = self.get()
        for name in now.keys() | saved.keys():
            before = saved.get(name, ABSENT)
            if before is now.get(name, ABSENT):
                continue
            if isinstance(self.holder, dict):
                _Slot(self.holder, name).set(before)
            elif before is ABSENT:
                delattr(self.holder, name)
            else:
                setattr(self.holder, name, before)


class Ledger:
    """Records contents at any depth, but does not descend into tensors and modules."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def attributes(self, holder: Any, label: str = "") -> None:
        """Record an object's attributes, in its ``__dict__`` and in slots."""
        table = getattr(holder, "__dict__", None)
        if isinstance(table, dict):
            self.contents(table, label, attributes=True)
        slots = slots_of(holder)
        if slots and id(holder) not in self._entries:
            self._entries[id(holder)] = _Entry(label, holder, slots)
            for name, value in slots.items():
                self.contents(value, _joined(label, name))

    def contents(self, value: Any, label: str = "", *, attributes: bool = False) -> None:
        """Record a dict, list, deque or set, and their contents."""
        if id(value) in self._entries:
            return
        if isinstance(value, dict):
            saved: Any = {k: item for k, item in entries_of(value) if id(item) not in LENT}
            children = saved.items()
        elif isinstance(value, _LISTS):
            saved = list(value)
            children = enumerate(saved)
        elif isinstance(value, _SETS):
            saved, children = set(value), ()
        elif type(value) is tuple:
            for i, item in enumerate(value):
                self.contents(item, f"{label}[{i}]")
            return
        else:
            return
        self._entries[id(value)] = _Entry(label, value, saved)
        for key, item in children:
            if isinstance(item, (dict, *_LISTS, *_SETS, tuple)):
                self.contents(item, _joined(label, key) if attributes else f"{label}[{key!r}]")

    def slot(self, holder: Any, key: str, label: str) -> None:
        """Record the value of a global name or a closure cell."""
        place = _Slot(holder, key)
        number = hash((id(holder), key))
        self._entries.setdefault(number, _Entry(label, place, place.get()))

    def names(self, holder: Any, label: str) -> None:
        """Record the names in a class or in a file's globals, but not their contents."""
        if id(holder) not in self._entries:
            place = _Names(holder)
            self._entries[id(holder)] = _Entry(label, place, place.get())

    def as_now(self) -> Ledger:
        """Return a ledger of the same places with their current contents."""
        later = Ledger()
        for entry in self._entries.values():
            if isinstance(entry.container, _Slot):
                later.slot(entry.container.holder, entry.container.key, entry.label)
            elif isinstance(entry.container, _Names):
                later.names(entry.container.holder, entry.label)
            elif isinstance(entry.container, (dict, *_LISTS, *_SETS)):
                later.contents(entry.container, entry.label)
            else:
                later.attributes(entry.container, entry.label)
        return later

    def changes(self) -> Iterator[Change]:
        """Return every place that holds a different object than before."""
        for entry in self._entries.values():
            yield from _changes(entry)

    def put_back(self) -> None:
        """Undo every change."""
        for entry in self._entries.values():
            if next(_changes(entry), None) is not None or not _same_order(entry):
                _write(entry)


def make_again(change: Change) -> None:
    """Repeat a recorded change if it is one of a dict."""
    if not isinstance(change.holder, dict):
        return
    if change.now is ABSENT:
        dict.pop(change.holder, change.key, None)
    else:
        dict.__setitem__(change.holder, change.key, change.now)


def slots_of(holder: Any) -> dict[str, Any]:
    """Return an object's attributes in slots."""
    found = {}
    for cls in type(holder).__mro__:
        if "__slots__" not in vars(cls):
            continue  # members of a class written in C may be read-only
        for name, value in vars(cls).items():
            if isinstance(value, types.MemberDescriptorType):
                try:
                    found[name] = value.__get__(holder)
                except AttributeError:  # empty
                    continue
    return found


def _joined(label: str, name: Any) -> str:
    return f"{label}.{name}" if label else str(name)


def _changes(entry: _Entry) -> Iterator[Change]:
    container, saved, label = entry.container, entry.saved, entry.label
    if isinstance(container, _Slot):
        if container.get() is not saved:
            yield Change(label, container.holder, container.key, saved, container.get())
        return
    if isinstance(container, _Names):
        names = container.get()
        for name in [*saved, *(n for n in names if n not in saved)]:
            then, value = saved.get(name, ABSENT), names.get(name, ABSENT)
            if then is not value:
                yield Change(f"{label}.{name}", container.holder, name, then, value)
        return
    if isinstance(container, _SETS):
        if container != saved:
            yield from (Change(label, container, e, ABSENT, e) for e in container - saved)
            yield from (Change(label, container, e, e, ABSENT) for e in saved - container)
        return
    if isinstance(container, _LISTS):
        if len(container) == len(saved) and all(map(is_, container, saved)):
            return
        before: dict[Any, Any] = dict(enumerate(saved))
        now: dict[Any, Any] = dict(enumerate(container))
    elif isinstance(container, dict):
        table: dict[Any, Any] = container
        before, now = saved, dict(entries_of(table))
        same = len(now) == len(saved) and all(map(is_, now.values(), saved.values()))
        if same and all(map(is_, now, saved)):
            return
    else:
        before, now = saved, slots_of(container)
    for key, value in now.items():
        if before.get(key, ABSENT) is not value:
            yield Change(label, container, key, before.get(key, ABSENT), value)
    for key, value in before.items():
        if key not in now:
            yield Change(label, container, key, value, ABSENT)


def _same_order(entry: _Entry) -> bool:
    if not isinstance(entry.container, dict):
        return True
    return all(map(is_, entry.container, entry.saved))


def _write(entry: _Entry) -> None:
    """Write as the base class does, past what a subclass overrides."""
    container, saved = entry.container, entry.saved
    if isinstance(container, (_Slot, _Names)):
        container.set(saved)
    elif isinstance(container, dict):
        base: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        base.clear(container)
        for key, value in saved.items():
            base.__setitem__(container, key, value)
    elif isinstance(container, list):
        list.__setitem__(container, slice(None), saved)
    elif isinstance(container, deque):
        deque.clear(container)
        deque.extend(container, saved)
    elif isinstance(container, set):
        set.clear(container)
        set.update(container, saved)
    else:
        for name, value in saved.items():
            object.__setattr__(container, name, value)
