"""What a traced step read besides its arguments, and whether that is unchanged.

A graph contains the numbers that forward and backward read from attributes of modules
and of other objects, from globals, class attributes and closures: a dropout's ``p``,
a temperature, a LoRA scaling. Changing one changes the step. So each place that was
read is remembered with its value, and compared in every step.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, repeat
from operator import attrgetter, call, contains, getitem, is_, is_not, itemgetter
from typing import Any

from ..errors import NotFittingError
from .holders import weakly
from .snapshots import (
    ABSENT,
    ATOMS,
    CONTAINERS,
    MAX_ARRAY_BYTES,
    Atom,
    Content,
    Held,
    Numbers,
    Snapshot,
    Thing,
    Wrapped,
    contents_in,
    difference,
    looked_at_in,
    size_of,
    snapshot,
)

_dict_of = attrgetter("__dict__")
SETTINGS = "PyTorch's settings"
"""Label of the place that holds the process-wide settings."""
_code_of = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_REGISTERED = ("_parameters", "_buffers", "_modules")
_facts_of = attrgetter("requires_grad", "dtype", "device", "shape")


class Where(Enum):
    """How to reach a place."""

    DICT = "in the __dict__ of an object, which is known by a weak reference"
    SHADOW = "not in the __dict__ of an object: its class had it, or nothing had"
    TABLE = "in a mapping: the globals of a file, the attributes of a class"
    ATTRIBUTE = "by getattr: a cell, a slot, a property"
    REGISTERED = "in a module's parameters, buffers or modules, where nothing or None was"
    ADDED = "names in the __dict__ of an object beside those that it had"
    ASKED = "the answer of a function that changes nothing"


class Ask:
    """A call that is made again in each step; its owner is held weakly if that can be.

    Parameters
    ----------
    owner
        A module or an object.
    name
        Of the function in it, or a function that is called with the owner.
    arguments, named
        Plain values.
    """

    def __init__(
        self,
        owner: Any,
        name: str | Callable[..., Any],
        arguments: tuple[Any, ...] = (),
        named: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        self._owner, self._name = weakly(owner), name
        self._arguments, self._named = arguments, dict(named)
        self.identity = id(owner), name, arguments, tuple(self._named.items())

    def is_gone(self) -> bool:
        """Whether nobody holds the owner any more."""
        return isinstance(self._owner, weakref.ref) and self._owner() is None

    def __call__(self) -> Any:
        """Return the answer, as a plain value; an error's name for an error."""
        owner = self._owner() if isinstance(self._owner, weakref.ref) else self._owner
        try:
            if not isinstance(self._name, str):
                return self._name(owner)
            answer = getattr(owner, self._name)
            if callable(answer):  # not a property
                answer = answer(*self._arguments, **self._named)
        except Exception as error:  # noqa: BLE001  what is asked may be the user's
            return type(error).__name__
        return answer if isinstance(answer, (*ATOMS, *CONTAINERS)) else str(answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Something that was read.

    Parameters
    ----------
    label
        In words: ``"attribute 'drop.p'"``.
    where, holder, key
        How to reach it. ``holder`` is a weak reference, but for ``TABLE``, and for
        ``ATTRIBUTE`` of an object that allows none.
    held
        What it held when it was read.
    names
        For ``ADDED``: the names that were there.
    """

    label: str
    where: Where
    holder: Any
    key: str
    held: Snapshot
    names: frozenset[str] = frozenset()

    def is_gone(self) -> bool:
        """Whether the object that was read is gone."""
        if isinstance(self.holder, Ask):
            return self.holder.is_gone()
        return isinstance(self.holder, weakref.ref) and self.holder() is None

    def is_empty(self) -> bool:
        """Whether nothing was there, or ``None``."""
        return isinstance(self.held, Atom) and (
            self.held.value is None or self.held.value is ABSENT
        )

    def now(self) -> Any:
        """What it holds now."""
        return self.now_in(self.holder() if isinstance(self.holder, weakref.ref) else self.holder)

    def now_in(self, holder: Any) -> Any:
        """What the same place of this holder holds."""
        if self.where is Where.TABLE:
            return holder.get(self.key, ABSENT)
        if self.where is Where.ASKED:
            return holder()
        if holder is None:
            return ABSENT
        if self.where is Where.ATTRIBUTE:
            try:
                return getattr(holder, self.key, ABSENT)
            except ValueError:  # an empty cell
                return ABSENT
        if self.where is Where.REGISTERED:
            tables = map(_dict_of(holder).__getitem__, _REGISTERED)
            return next((table[self.key] for table in tables if self.key in table), ABSENT)
        if self.where is Where.ADDED:
            return ", ".join(sorted(_dict_of(holder).keys() - self.names))
        return _dict_of(holder).get(self.key, ABSENT)


def place_of(
    label: str, where: Where, holder: Any, key: str, *, replaceable: bool = False
) -> Place:
    """Return a place with its current contents; ``replaceable`` is as for a snapshot."""
    place = Place(label=label, where=where, holder=holder, key=key, held=snapshot(None))
    held = snapshot(place.now(), replaceable=replaceable)
    return Place(label=label, where=where, holder=holder, key=key, held=held)


def nothing_added(label: str, holder: Any, names: Iterable[str]) -> Place:
    """Return the place of attributes that an object may get, beside those of these names."""
    return Place(
        label=label,
        where=Where.ADDED,
        holder=holder,
        key="__dict__",
        held=snapshot(""),
        names=frozenset(names),
    )


def refuse_too_large(places: Iterable[Place]) -> None:
    """Refuse arrays that are too large to compare in each step.

    Raises
    ------
    NotFittingError
        Names the first one.
    """
    for place in places:
        for held in looked_at_in(place.held):
            if isinstance(held, Numbers) and held.is_too_large():
                raise NotFittingError(
                    f"forward reads {place.label}, which holds an array of more than "
                    f"{MAX_ARRAY_BYTES / 1e6:.0f} MB, whose numbers would have to be compared in "
                    "each step: keep them in a buffer (register_buffer), or pass them as an "
                    "argument"
                )


class Reads:
    """Every place that a step read; its only state is what makes the next comparison cheap."""

    def __init__(self, places: Iterable[Place] = ()) -> None:
        self._places = tuple(places)
        self._fast: _Fast | None = None

    @property
    def places(self) -> tuple[Place, ...]:
        """What was read."""
        return self._places

    def settings_difference(self) -> str | None:
        """Describe a change of PyTorch's settings; ``None`` if there is none."""
        of_process = (place for place in self._places if place.label == SETTINGS)
        return next((difference(p.held, p.now(), p.label) for p in of_process), None)

    def difference(self) -> str | None:
        """Describe the first place whose contents changed; ``None`` if there is none."""
        if self._fast is not None and self._fast.unchanged():
            return None
        of_the_model = [place for place in self._places if place.label != SETTINGS]
        if of_the_model and all(place.is_gone() for place in of_the_model):
            return "what was read while planning is gone"
        for place in self._places:
            if place.is_gone():
                continue  # forward itself made it; a replaced part is seen at its holder
            found = difference(place.held, place.now(), place.label)
            if found:
                return found
        self._fast = _Fast(self._places)
        return None


class _Fast:
    """The comparison as a few calls in C: every value is the same object as before.

    Equal values in other objects are compared the long way once. From then on, those
    objects are the expected ones.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        owned: dict[int, list[Place]] = {}
        tables: dict[int, list[Place]] = {}
        self._contents: list[_Items] = []
        self._looked_at: list[Numbers | Wrapped] = []
        absent: list[tuple[Any, str]] = []
        functions: dict[types.FunctionType, None] = {}
        things: list[tuple[Place, Callable[[], Any]]] = []
        self._tensors: list[tuple[Place, Any, Any]] = []
        self._others: list[tuple[Place, Any]] = []
        owners: dict[int, Any] = {}
        empty: list[tuple[Any, str, str]] = []
        self._asked: list[tuple[Any, Any]] = []
        for place in places:
            if place.where is Where.ASKED:
                if not place.is_gone():
                    answer = snapshot(place.now(), keep=True)
                    if isinstance(answer, Numbers):
                        self._looked_at.append(answer)
                    else:
                        self._asked.append((place.holder, place.now()))
                continue
            if place.where in (Where.DICT, Where.SHADOW, Where.ADDED):
                owner = place.holder()
                if owner is None:
                    continue
                owners.setdefault(id(owner), place.holder)
                if place.where is not Where.DICT:  # the number of attributes says enough
                    continue
            if place.where is Where.REGISTERED:
                if not place.is_gone():
                    empty += [(place.holder, table, place.key) for table in _REGISTERED]
                continue
            now = place.now()
            if now is ABSENT and place.where is Where.TABLE:
                absent.append((place.holder, place.key))
                continue
            held = snapshot(now, keep=True)
            self._contents += [
                _Items(content)
                for content in contents_in(held)
                if not isinstance(content.container, tuple)  # which stays as it is
            ]
            self._looked_at += looked_at_in(held)
            if isinstance(place.holder, types.FunctionType):
                functions[place.holder] = None
                continue
            if isinstance(held, Held):
                self._tensors.append((place, _facts_of(now), now.stride()))
                if isinstance(place.held, Held) and place.held.reference is not None:
                    things.append((place, place.held.reference))
            elif isinstance(held, (Thing, Numbers, Wrapped)):
                if held.reference is not None:
                    things.append((place, held.reference))
            elif place.where is Where.DICT:
                owned.setdefault(id(place.holder()), []).append(place)
            elif place.where is Where.TABLE:
                tables.setdefault(id(place.holder), []).append(place)
            else:
                self._others.append((place, now))
        self._absent_from = [holder for holder, _ in absent]
        self._absent = [key for _, key in absent]
        self._registered_in = [[each[i] for each in empty] for i in range(3)]
        self._functions = list(functions)
        self._code = list(map(_code_of, self._functions))
        self._things = [(p, r) for p, r in things if p.where is not Where.DICT]
        # Owners with an attribute to compare come first; for the others, only the number of
        # attributes is compared.
        ids = [*owned, *(i for i in owners if i not in owned)]
        self._owners = [owners[i] for i in ids]
        at = {i: n for n, i in enumerate(ids)}
        placed = [(at[id(p.holder())], p.key, r) for p, r in things if p.where is Where.DICT]
        self._things_at = [n for n, _, _ in placed]
        self._thing_names = [key for _, key, _ in placed]
        self._thing_references = [reference for _, _, reference in placed]
        self._lengths = [len(_dict_of(owners[i]())) for i in ids]
        self._tables = [group[0].holder for group in tables.values()]
        groups = [*owned.values(), *tables.values()]
        self._getters = [_getter([p.key for p in group]) for group in groups]
        self._num_owned = len(owned)
        self._expected = [
            *chain.from_iterable(
                getter(_table_of(group[0]))
                for getter, group in zip(self._getters, groups, strict=True)
            )
        ]

    def unchanged(self) -> bool:
        """Whether every place still holds the same object."""
        try:
            dicts = [*map(_dict_of, map(call, self._owners))]
            if [*map(len, dicts)] != self._lengths:
                return False
            things = map(getitem, map(dicts.__getitem__, self._things_at), self._thing_names)
            if not all(map(is_, things, map(call, self._thing_references))):
                return False
            dicts[self._num_owned :] = self._tables
            values = chain.from_iterable(map(call, self._getters, dicts))
            return (
                all(map(is_, values, self._expected))
                and not any(_registered(*self._registered_in))
                and all(items.unchanged() for items in self._contents)
                and not any(map(contains, self._absent_from, self._absent))
                and all(each.unchanged() for each in self._looked_at)
                and all(map(_same_code, map(_code_of, self._functions), self._code))
                and all(place.now() is thing() for place, thing in self._things)
                and all(place.now() is value for place, value in self._others)
                and all(ask() == answer for ask, answer in self._asked)
                and all(
                    _facts_of(tensor) == facts and tensor.stride() == stride
                    for place, facts, stride in self._tensors
                    for tensor in [place.now()]
                )
            )
        except (AttributeError, KeyError, TypeError):  # an object or a value that is gone
            return False


class _Items:
    """The items of a container: plain values and containers, tensors and other objects."""

    def __init__(self, content: Content) -> None:
        self._container = content.container
        self._count = size_of(content.container)
        self._set = frozenset(content.keys) if content.items == () and self._count else None
        # Keys in order, because forward may depend on it.
        ordered = isinstance(content.container, dict) and content.items is not None
        self._keys = content.keys if ordered else None
        items = [*zip(content.keys, content.items or (), strict=False)]
        plain = [key for key, item in items if isinstance(item, (Atom, Content))]
        others = [
            (key, item.reference)
            for key, item in items
            if isinstance(item, (Held, Thing, Numbers, Wrapped)) and item.reference is not None
        ]
        self._plain = _getter(plain) if plain else None
        self._expected = () if self._plain is None else self._plain(self._container)
        self._others = _getter([key for key, _ in others]) if others else None
        self._references = [*(r for _, r in others), *(r for _, r in others[:1])]

    def unchanged(self) -> bool:
        container = self._container
        if len(container) != self._count:
            return False
        if self._set is not None:
            return bool(container == self._set)
        if self._keys is not None and not all(map(is_, container, self._keys)):
            return False
        if self._plain is not None and not all(map(is_, self._plain(container), self._expected)):
            return False
        return self._others is None or all(
            map(is_, self._others(container), map(call, self._references))
        )


def _registered(references: list[Any], tables: list[str], names: list[str]) -> Iterator[bool]:
    """Whether a module has a parameter, buffer or module of a name, one by one."""
    held = map(getitem, map(_dict_of, map(call, references)), tables)
    return map(is_not, map(dict.get, held, names), repeat(None))


def _table_of(place: Place) -> Any:
    return place.holder if place.where is Where.TABLE else _dict_of(place.holder())


def _same_code(now: tuple[Any, ...], then: tuple[Any, ...]) -> bool:
    return all(map(is_, now, then))


def _getter(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Return a getter of a tuple of values, even of a single one."""
    return itemgetter(*keys, keys[0])
