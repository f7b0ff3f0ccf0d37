"""Where what a step has read lies, so that later steps can look there again."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import nn

from .foreign_names import foreign_places
from .holders import dict_of, in_class, weakly
from .looking_into import NAMESPACES
from .met import Met
from .named_reads import is_library, is_users, is_users_class, strings_in
from .reads import Ask, Place, Where, nothing_added, place_of
from .snapshots import ABSENT, BY_VALUE, CONTAINERS, Atom, difference, snapshot
from .whole_dicts import keys_asked

IGNORED = frozenset({*vars(nn.Module()), "training"})
"""Attributes of every module, which the guard of a call compares."""


def read_places(met: Met) -> list[Place]:
    """Return the places of what was met, each with what it holds now."""
    _class_of_root(met)
    _classes_of_holders(met)
    places: list[Place] = []
    noted = set(met.noted)
    words = met.words | met.strings
    for holder, name in list(met.noted.values()):
        if holder is None or (holder is met.root and name == "forward"):
            continue
        unwatched = isinstance(holder, NAMESPACES) or type(holder) in met.unwatchable
        if unwatched and name not in words:
            continue
        places += _places_of(met, holder, name)
    for holder, code in met.asked_for_all.values():
        places += _asked_by_key(met, holder, code, keys_asked(code), noted)
    for holder, code in _asked_past_watching(met):
        places += _asked_by_key(met, holder, code, None, noted)
    for module, name in met.modules.names(words):
        label = f"'{module.__name__}.{name}'"
        at = id(vars(module)), name
        met.named.setdefault(at, (label, Where.TABLE, vars(module), name))
    _attributes_of_functions(met)
    for label, where, holder, key in met.named.values():
        places.append(place_of(label, where, holder, key))
    places += met.modules.missing()
    places += met.attributes.places()
    places += _of_tensors(met)
    places += [
        place_of("an array of the call", Where.ASKED, Ask(value, lambda array: array), "")
        for value in met.objects
        if isinstance(value, np.ndarray)
    ]
    places += met.foreign.places(words)
    for chain in dict.fromkeys(met.chains):
        places += foreign_places(*chain)
    return places


def _of_tensors(met: Met) -> Iterator[Place]:
    """Attributes that the loop has given to parameters and buffers, as far as named."""
    for tensor in met.stands_for.values():
        for name in dict_of(tensor).keys() & (met.words | met.strings):
            label = f"'{name}' of a tensor of the model"
            yield place_of(label, Where.DICT, weakly(tensor), name)


def _attributes_of_functions(met: Met) -> None:
    """Attributes of the functions that were met, as far as anything names them."""
    functions = [f for f in met.seen.values() if isinstance(f, types.FunctionType)]
    for function in functions:
        if is_library(function.__code__) or not is_users(function.__code__):
            continue
        for name in vars(function).keys() & (met.words | met.strings):
            label = f"'{function.__qualname__}.{name}'"
            place = label, Where.DICT, weakly(function), name
            met.named.setdefault((id(function), name), place)


def _asked_by_key(
    met: Met,
    holder: Any,
    code: types.CodeType,
    keys: frozenset[str] | None,
    noted: set[tuple[int, str]],
) -> Iterator[Place]:
    """Attributes that a function read from an object's dict, and those that it may miss there.

    Without ``keys``, a user's function may have read any.
    """
    held = dict_of(holder)
    before = met.own_before.get(id(holder), held)
    names = keys
    if names is None:
        names = frozenset(held)
        if is_library(code):
            names = names.intersection(code.co_consts) or names
        elif weakly(holder) is not holder:
            of = met.name_of.get(id(holder)) or type(holder).__name__
            known = (*held, "forward")  # where a plan is put
            yield nothing_added(f"what was added to {of}", weakly(holder), known)
    for name in names - IGNORED:
        own = held.get(name, ABSENT) is before.get(name, ABSENT)  # not put there by forward
        if own and (id(holder), name) not in noted:
            yield from _places_of(met, holder, name)


def _asked_past_watching(met: Met) -> list[tuple[Any, types.CodeType]]:
    """Objects that a function may have read past their classes, with the function's code.

    Its strings are the names, wherever they are found. A function that computes the
    names may have read any.
    """
    objects = [value for value in met.seen.values() if is_users_class(type(value))]
    holders = [*met.root.modules(), *objects]
    asked = []
    for code in met.past_watching.values():
        known = strings_in(code)
        found = [holder for holder in holders if known & dict_of(holder).keys()]
        asked += [(holder, code) for holder in found or ([] if is_library(code) else holders)]
    return asked


def _class_of_root(met: Met) -> None:
    """Note the class that defines the root's forward; the planner replaces the instance's."""
    cls = in_class(type(met.root), "forward")[0]
    if cls is not None:
        table = met.table(cls)
        label = f"'{cls.__name__}.forward'"
        met.named[id(table), "forward"] = (label, Where.TABLE, table, "forward")


def _classes_of_holders(met: Met) -> None:
    """Numbers that a class holds and that are read through ``cls`` or ``type(met: Met)``."""
    classes = {type(holder) for holder, _ in met.noted.values()}
    classes |= {value for value in met.seen.values() if isinstance(value, type)}
    if met.past_watching:
        classes |= {type(value) for value in met.seen.values()}
    for cls in {base for each in classes for base in each.__mro__ if is_users_class(base)}:
        table = met.table(cls)
        for name, value in table.items():
            plain = isinstance(value, (*BY_VALUE, *CONTAINERS))
            if plain and name in met.words and not name.startswith("__"):
                label = f"'{cls.__name__}.{name}'"
                met.named[id(table), name] = (label, Where.TABLE, table, name)


def _places_of(met: Met, holder: Any, name: str) -> Iterable[Place]:
    label = f"attribute {met.path(holder, name)!r}"
    reference = weakly(holder)
    held = dict_of(holder)
    if name in held and reference is not holder:
        replaceable = met.path(holder, name) in met.replaceable
        yield place_of(label, Where.DICT, reference, name, replaceable=replaceable)
        return
    cls, value = in_class(type(holder), name)
    if reference is not holder and hasattr(holder, "__dict__"):
        yield Place(
            label=label, where=Where.SHADOW, holder=reference, key=name, held=snapshot(ABSENT)
        )
    if cls is None and isinstance(holder, nn.Module):
        place = place_of(label, Where.REGISTERED, reference, name)
        if place.is_empty():  # the call's guard compares the others
            yield place
    if cls is None or isinstance(value, types.MemberDescriptorType):
        place = place_of(label, Where.ATTRIBUTE, reference, name)
        missing = isinstance(place.held, Atom) and place.held.value is ABSENT
        # Wrappers that are created anew on each read have no identity to compare.
        alike = missing or difference(place.held, place.now(), label) is None
        if missing:  # a slot may be filled later
            alike = not hasattr(holder, "__dict__")
        if not isinstance(holder, nn.Module) and alike:
            yield place
    elif is_users_class(cls) or name == "forward":
        before = type(holder).__mro__[: type(holder).__mro__.index(cls)]
        for base in (*filter(is_users_class, before), cls):  # where another may appear
            key = id(met.table(base)), name
            label = f"'{base.__name__}.{name}'"
            met.named.setdefault(key, (label, Where.TABLE, met.table(base), name))


__all__ = ["IGNORED", "read_places"]
