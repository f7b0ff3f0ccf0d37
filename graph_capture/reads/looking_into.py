"""Look into what a step reads: objects lead to functions, and functions name objects.

Globals, class attributes and closure cells are found in the code of the functions that are
met: forwards and hooks, the functions of a custom ``autograd.Function``, and functions that
those name.
"""

from __future__ import annotations

import abc
import argparse
import builtins
import decimal
import enum
import functools
import os
import queue
import threading
import types
import weakref
from collections import ChainMap, UserDict, UserList
from contextvars import ContextVar
from itertools import islice
from typing import Any

import torch
from torch import nn

from .function_caches import CACHED
from .holders import dict_of, in_class, is_users_module, may_change, weakly
from .ledger import LENT, slots_of
from .met import Met
from .named_reads import (
    PAST_CLASSES,
    asks_past_classes,
    is_library,
    is_users,
    is_users_class,
    is_users_own,
    names_in,
    stored_in,
    strings_in,
    words_in,
)
from .reads import Where
from .snapshots import ABSENT, ATOMS, CONTAINERS, WRAPPERS, entries_of, parts_of
from .watched_classes import WatchedClasses

NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
"""Objects whose reads are not seen, and that are nothing but their attributes."""

_ENVIRONMENT = ("environ", "getenv")
_LIKE_USERS = (ChainMap, UserDict, UserList)  # Python's own, written in Python
_PYTORCHS = (  # PyTorch's own objects that loops change, or that keep what was computed once
    *(torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler),
    *(torch.distributions.Distribution, torch.distributions.Transform, torch.utils.data.Dataset),
)
_PARTS_OF_FUNCTIONS = (
    ("__code__", "code"),
    ("__defaults__", "defaults"),
    ("__kwdefaults__", "keyword defaults"),
)
_PLAIN_CALLS = (types.FunctionType, types.WrapperDescriptorType)
_MAX_MET = 1000  # items of a container that are looked into
_MAX_DEPTH = 20
_SURE_DEPTH = 3  # up to which a container is looked into again, since forward may have filled it
_RUN_BY_AUTOGRAD = ("forward", "backward", "setup_context", "vjp", "jvp")


class LookingInto:
    """Follows what is read, and notes it in ``met``."""

    def __init__(self, met: Met) -> None:
        self._met = met
        self.classes = WatchedClasses()
        self._deep: dict[int, Any] = {}  # containers far inside others

    def note(self, holder: Any, name: str) -> None:
        """Note that an attribute is read, and look into its value."""
        key = (id(holder), name)
        if (
            key in self._met.noted
            or name.startswith("__")
            or threading.get_ident() != self._met.thread
        ):
            return
        self._met.noted[key] = (holder, name)
        held = dict_of(holder)
        if name in held:
            before = self._met.own_before.get(id(holder))
            if before is not None and before.get(name, ABSENT) is not held[name]:
                self._met.noted[key] = (None, name)  # forward itself has put it there
                return
            self.meet(held[name], self._met.path(holder, name))
        else:
            self.meet(in_class(type(holder), name)[1], self._met.path(holder, name))

    def meet(self, value: Any, path: str, depth: int = 0) -> None:
        """Look into what was read: functions may be called, objects may be read."""
        if isinstance(value, types.ModuleType):
            self._met.modules.meet(value)
            return
        if type(value) in weakref.ProxyTypes:
            value = value.__repr__.__self__  # what it stands for
        if isinstance(value, (torch.Tensor, nn.Module)):
            return
        self._met.generators.meet(value, path)
        if isinstance(value, decimal.Decimal):
            self._met.decimals = True
        if isinstance(value, types.FunctionType):
            if not depth or not is_library(value.__code__):  # a library's registry names hundreds
                self._function(value)
            if isinstance(registry := vars(value).get("registry"), types.MappingProxyType):
                self._registry(value, registry)
        elif isinstance(value, types.MethodType):
            self.meet(value.__func__, path)
            self.meet(value.__self__, path)
        elif isinstance(value, (staticmethod, classmethod)):
            self.meet(value.__func__, path)
        elif isinstance(value, property):
            self.meet(value.fget, path)
        elif isinstance(value, functools.cached_property):
            self.meet(value.func, path)
        elif isinstance(value, CACHED):
            self._met.caches[id(value)] = value
            self.meet(value.__wrapped__, path)
        elif isinstance(value, weakref.ref):
            self.meet(value(), path, depth)
        elif isinstance(value, functools.partial):
            self._met.outside.contents(value.args, path)
            self._met.outside.contents(value.keywords, path)
            self.meet(value.func, path)
            self.meet((value.args, value.keywords), path, depth + 1)
        elif isinstance(value, WRAPPERS):
            if isinstance(value, ContextVar):
                self._met.outside.slot(value, "", value.name)
            for part in parts_of(value):
                self._met.outside.contents(part, path)
            self.meet(parts_of(value), path, depth + 1)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, CONTAINERS) and self._looks_into(value, depth):
            items = enumerate(value) if isinstance(value, (set, frozenset)) else entries_of(value)
            for at, inner in islice(items, _MAX_MET):
                self.meet(inner, f"{path}[{at!r}]", depth + 1)
                if not isinstance(at, ATOMS):
                    self.meet(at, path, depth + 1)  # a key of a dict
        if not isinstance(value, ATOMS):
            self._object(value, path)

    def _looks_into(self, container: Any, depth: int) -> bool:
        if depth < _SURE_DEPTH:
            return True
        known = id(container) in self._deep or len(self._deep) > _MAX_MET
        self._deep[id(container)] = container
        return not known and depth < _MAX_DEPTH

    def _function(self, function: types.FunctionType) -> None:
        if id(function) in self._met.seen:
            return
        self._met.seen[id(function)] = function
        self._met.seen[id(function.__code__)] = function.__code__
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if is_users(function.__code__):
            self.names(function.__code__, function.__globals__, function)
            if not is_library(function.__code__):  # others are not edited while they run
                self.parts(function)
                self._met.outside.contents(vars(function), function.__qualname__, attributes=True)
                for value in defaults:
                    self._met.outside.contents(value, f"the defaults of {function.__qualname__}")
            self.meet(defaults, f"the defaults of {function.__qualname__}")
        self.meet(getattr(function, "__wrapped__", None), "")

    def parts(self, function: types.FunctionType) -> None:
        """Note what a function consists of."""
        for part, words in _PARTS_OF_FUNCTIONS:
            label = f"the {words} of {function.__qualname__}"
            self._met.named[id(function), part] = (label, Where.ATTRIBUTE, function, part)

    def _registry(self, function: types.FunctionType, registry: Any) -> None:
        """Note what is registered with a ``functools.singledispatch``."""
        if (id(function), "registry") not in self._met.named:
            label = f"what is registered with {function.__qualname__}"
            place = label, Where.DICT, weakly(function), "registry"
            self._met.named[id(function), "registry"] = place
            self.meet(registry, function.__qualname__)

    def _class(self, cls: type) -> None:
        if id(cls) in self._met.seen or not is_users_class(cls):
            return
        self._met.seen[id(cls)] = cls
        self._met.abstract = self._met.abstract or (
            isinstance(cls, abc.ABCMeta) and is_users_own(cls)
        )
        self.remember_classes(cls)
        if is_users_class(type(cls)):
            self._class(type(cls))
        if issubclass(cls, torch.autograd.Function):
            for name in _RUN_BY_AUTOGRAD:
                self.meet(in_class(cls, name)[1], "")

    def _object(self, value: Any, path: str) -> None:
        cls = type(value)
        if id(value) in self._met.seen:
            return
        if isinstance(value, NAMESPACES):
            self._met.seen[id(value)] = value
            self._met.name_of.setdefault(id(value), path)
            self._met.outside.attributes(value, path)
            self._note_all(value)
            return
        if isinstance(value, queue.Queue):
            self._met.outside.attributes(value, path)
        watchable = is_users_class(cls) or cls in _LIKE_USERS or isinstance(value, _PYTORCHS)
        if isinstance(value, enum.Enum) or not watchable:
            self._met.foreign.meet(value, path)
            return
        self._met.seen[id(value)] = value
        self._met.name_of.setdefault(id(value), path)
        self._met.outside.attributes(value, path)
        self.remember_classes(cls)
        self.meet(in_class(cls, "__call__")[1], "")
        self.classes.add(cls)
        if cls in self._met.unwatchable:
            self._note_all(value)

    def remember_classes(self, cls: type) -> None:
        """Remember the contents of a class and its bases, but not those of installed packages."""
        for base in filter(is_users_class, cls.__mro__):
            if is_users_own(base):
                self._met.outside.names(base, base.__name__)

    def _note_all(self, value: Any) -> None:
        """Count every attribute that is named anywhere, of an object that cannot be watched."""
        for name in (*dict_of(value), *slots_of(value)):
            self.note(value, name)

    def asked_for_all(self, holder: Any, code: types.CodeType) -> None:
        """Note that a function asks for all attributes of an object at once."""
        self._met.asked_for_all[id(holder), id(code)] = (holder, code)

    def cannot_watch(self, cls: type) -> None:
        """Note that reads of objects of a class are not seen: any may happen."""
        self._met.unwatchable.add(cls)
        for value in [value for value in self._met.seen.values() if type(value) is cls]:
            self._note_all(value)

    # -- what functions name -----------------------------------------------------

    def names(
        self, code: types.CodeType, table: dict[str, Any], function: types.FunctionType | None
    ) -> None:
        """Note what a function names, its closure included if the function itself is known."""
        self._met.words.update(words_in(code))
        self._met.strings.update(strings_in(code))
        if asks_past_classes(code):
            self._asks_past_classes(code)
        if not is_library(code):
            self._met.modules.imports_of(code, table.get("__package__"))
            self._met.clocks.look(
                code, table, [names[1:] for names in names_in(code) if not names[0]]
            )
            if "globals" in code.co_names:
                for name in strings_in(code):
                    self._met.outside.slot(table, name, name)
                for name in strings_in(code) & table.keys():
                    self._follow(f"global {name!r}", Where.TABLE, table, name, (), code)
        for free, name, attributes in names_in(code):
            if not free and name in table:
                value = table[name]
                if isinstance(value, _PLAIN_CALLS) and value.__name__ in PAST_CLASSES:
                    self._asks_past_classes(code)
                self._follow(f"global {name!r}", Where.TABLE, table, name, attributes, code)
            elif not free and not hasattr(builtins, name) and not is_library(code):
                at = (id(table), name)
                self._met.named.setdefault(at, (f"global {name!r}", Where.TABLE, table, name))
            elif free and function is not None and function.__closure__ is not None:
                cell = function.__closure__[code.co_freevars.index(name)]
                label = f"{name!r} in the closure of {code.co_name}"
                self._follow(label, Where.ATTRIBUTE, cell, "cell_contents", attributes, code)

    def _asks_past_classes(self, code: types.CodeType) -> None:
        self._met.past_watching[id(code)] = code
        self._met.words.update(strings_in(code))

    def _follow(
        self,
        label: str,
        where: Where,
        holder: Any,
        key: str,
        attributes: tuple[str, ...],
        code: types.CodeType,
    ) -> None:
        """Follow a name, and the attributes that are read from what it stands for."""
        try:
            value = holder[key] if where is Where.TABLE else getattr(holder, key)
        except ValueError:  # a cell that is still empty
            return
        if id(value) in LENT:
            return
        path = label.split("'")[1] if "'" in label else label
        if (value is decimal or value is decimal.Decimal) and not is_library(code):
            self._met.decimals = True
        if isinstance(value, types.ModuleType):
            if (
                value is os
                and attributes
                and attributes[0] in _ENVIRONMENT
                and not is_library(code)
            ):
                label, where = "an environment variable", Where.ATTRIBUTE
                self._met.named[id(os.environ), "_data"] = (label, where, os.environ, "_data")
            if attributes and attributes[0] in vars(value) and may_change(value, attributes[0]):
                inside = f"'{value.__name__}.{attributes[0]}'"
                rest = attributes[1:]
                self._follow(inside, Where.TABLE, vars(value), attributes[0], rest, code)
            elif attributes and is_users_module(value) and not is_library(code):
                self._met.attributes.note(value, attributes[0], value.__name__)
            elif attributes and not is_library(code):
                self._met.chains.append((value, attributes, strings_in(code)))
            elif not attributes and not is_library(code):
                self._met.modules.meet(value)
            return
        library = is_library(code)
        if library and isinstance(value, CACHED):
            self._met.caches[id(value)] = value
        if library and not isinstance(value, (*ATOMS, torch.Tensor)):
            return  # registries, loggers
        if library and isinstance(value, types.FunctionType) and where is Where.ATTRIBUTE:
            return  # what a decorator wraps
        self._met.named[id(holder), key] = (label, where, holder, key)
        if not library:
            self._met.outside.contents(value, path)
            if path in stored_in(code) and isinstance(holder, (dict, types.CellType)):
                self._met.outside.slot(holder, key, path)
        if isinstance(value, type):
            self._class(value)
            cls = in_class(value, attributes[0])[0] if attributes else None
            if attributes and cls is None and not library and not issubclass(value, enum.Enum):
                self._met.attributes.note(value, attributes[0], path)
            if cls is not None and is_users_class(cls):
                inside, table = f"'{path}.{attributes[0]}'", self._met.table(cls)
                self._follow(inside, Where.TABLE, table, attributes[0], attributes[1:], code)
        elif isinstance(value, types.FunctionType) and library:
            return  # an installed package: what else it calls is seen when it runs
        else:
            if isinstance(value, types.FunctionType) and attributes:
                name = attributes[0]
                at = Where.DICT if name in vars(value) else Where.SHADOW
                inside = f"'{path}.{name}'"
                self._met.named.setdefault((id(value), name), (inside, at, weakly(value), name))
            self.meet(value, path)


__all__ = ["NAMESPACES", "LookingInto"]
