"""Observe what a step reads besides its arguments while it is traced.

Reads of module attributes are seen because ``nn.Module.__getattribute__`` is replaced
during the trace. For other objects that are met (a configuration, a schedule), the
``__getattribute__`` of their classes is replaced. Globals, class attributes and
closure cells are found in the code of the functions that are met: forwards and hooks,
the functions of a custom ``autograd.Function``, functions that those name, and all
functions on the stack when an operator is called.
"""

from __future__ import annotations

import abc
import argparse
import builtins
import decimal
import enum
import functools
import gc
import logging
import os
import queue
import sys
import threading
import types
import weakref
from collections import ChainMap, UserDict, UserList
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import NotFittingError
from .asked_attributes import AskedAttributes
from .asked_elsewhere import AskedElsewhere
from .clocks import ClocksMet
from .foreign_generators import ForeignGenerators
from .foreign_names import ForeignObjects, foreign_places
from .holders import dict_of, in_class, is_users_module, may_change, weakly
from .ledger import Change, Ledger, slots_of
from .modules_met import ModulesMet
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
from .process_wide import PROCESS_WIDE
from .reads import SETTINGS, Ask, Place, Reads, Where, nothing_added, place_of, refuse_too_large
from .snapshots import (
    ABSENT,
    ATOMS,
    BY_VALUE,
    CONTAINERS,
    WRAPPERS,
    Atom,
    difference,
    entries_of,
    parts_of,
    snapshot,
)
from .whole_dicts import ALL_AT_ONCE, keys_asked, who_asks

logger = logging.getLogger(__name__)

_HEAP_TYPE, _IMMUTABLE_TYPE = 1 << 9, 1 << 8  # Py_TPFLAGS_HEAPTYPE, Py_TPFLAGS_IMMUTABLETYPE
_TABLES_OF_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("hooks"))
_TABLES_FOR_ALL = tuple(
    table
    for name, table in vars(nn.modules.module).items()
    if name.startswith("_global_") and isinstance(table, dict)
)
_IGNORED = frozenset({*vars(nn.Module()), "training"})
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
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
_CACHED = type(functools.lru_cache(len))  # no other name
_WITH_NAMES = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
)
_PLAIN_CALLS = (types.FunctionType, types.WrapperDescriptorType)
_MAX_MET = 1000  # items of a container that are looked into
_MAX_DEPTH = 20
_SURE_DEPTH = 3  # up to which a container is looked into again, since forward may have filled it
_RUN_BY_AUTOGRAD = ("forward", "backward", "setup_context", "vjp", "jvp")


class Watcher:
    """Collects what is read while :meth:`watching`.

    Parameters
    ----------
    model
        Gives names to modules; its hooks and its forward are examined.
    forward
        The function that is called.
    objects
        Arguments other than tensors: objects with attributes, functions, arrays.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[..., Any], objects: Iterable[Any] = ()
    ) -> None:
        self._root = model
        self._name_of: dict[int, str] = {id(m): path for path, m in model.named_modules()}
        self._noted: dict[tuple[int, str], tuple[Any, str]] = {}
        self._own_before: dict[int, dict[str, Any]] = {}
        self._named: dict[tuple[int, str], tuple[str, Where, Any, str]] = {}
        self._tables: dict[type, Any] = {}
        self._seen: dict[int, Any] = {}  # functions, codes and objects that were met, kept alive
        self._classes: dict[type, Any] = {}  # classes with a replaced method -> their own method
        self._unresolved: list[types.CodeType] = []
        self._forward = forward
        self._active = False
        self._objects = list(objects)
        self._written: set[tuple[int, str]] = set()
        self.outside = Ledger()  # what closures, globals and objects that were met held
        self._foreign = ForeignObjects()
        self._modules = ModulesMet(self.outside.names, self._foreign.meet_file)
        self.generators = ForeignGenerators()
        self.clocks = ClocksMet()
        self.settled: list[Change] = []  # what forward reads and changes once
        self.replaceable: set[str] = set()  # attributes whose tensors are inputs of the step
        # What was asked for its attributes by vars() or ``__dict__``, and by which code.
        self._asked_for_all: dict[tuple[int, int], tuple[Any, types.CodeType]] = {}
        self._thread = threading.get_ident()  # others train models of their own
        self._past_watching: dict[int, types.CodeType] = {}  # reads by object.__getattribute__
        self._unwatchable: set[type] = set()  # classes whose method cannot be replaced
        self._words: set[str] = set()  # names that occur in the functions that were met
        self._strings: set[str] = set()  # identifiers that occur in them as strings
        self._deep: dict[int, Any] = {}  # containers far inside others
        self.stands_for: dict[int, torch.Tensor] = {}  # by the id of a stand-in, the model's tensor
        self.of_call: dict[int, torch.Tensor] = {}  # by the id of a stand-in, the call's tensor
        self._attributes = AskedAttributes()
        self._abstract = False  # whether an abstract class was met, with which others register
        self._chains: list[tuple[types.ModuleType, tuple[str, ...], frozenset[str]]] = []
        self.elsewhere = AskedElsewhere(
            self._runs,
            self._asked_for,
            self._asked_for_names,
            lambda value: self.stands_for.get(id(value), value),
            lambda value: self._foreign.meet_whole(value, type(value).__name__),
        )

    # -- while the step runs ---------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While active, reads are noted."""
        for module in self._root.modules():
            self._own_before.setdefault(id(module), dict(vars(module)))
            self._remember_classes(type(module))
            for table in _TABLES_OF_HOOKS:
                self._meet(vars(module).get(table), "")
        for hooks in _TABLES_FOR_ALL:
            self._meet(hooks, "")
        self._meet(self._forward, "")
        for value in self._objects:
            self._meet(value, type(value).__name__)
        mine = vars(nn.Module).get("__getattribute__", ABSENT)
        setter = nn.Module.__setattr__
        note, ignored, written = self._note, _IGNORED, self._written
        guarded = {id(module) for module in self._root.modules()}  # whose modes the call guard sees

        def setting(module: nn.Module, name: str, value: Any) -> None:
            if threading.get_ident() == self._thread:
                written.add((id(module), name))
            setter(module, name, value)

        def watched(module: nn.Module, name: str) -> Any:
            if name not in ignored or (name == "training" and id(module) not in guarded):
                note(module, name)
            if name in ALL_AT_ONCE and (code := who_asks(sys._getframe(1))):
                self._asked_for_all[id(module), id(code)] = (module, code)
            return super(nn.Module, module).__getattribute__(name)

        self._thread = threading.get_ident()
        with ExitStack() as undo:  # after an error, too
            undo.callback(self._put_back_classes)
            self._active = True
            for cls in list(self._classes):
                self._exchange(cls)
            undo.callback(_put_back, nn.Module, mine)
            undo.callback(setattr, nn.Module, "__setattr__", setter)
            nn.Module.__getattribute__ = watched  # type: ignore[method-assign, assignment]
            nn.Module.__setattr__ = setting  # type: ignore[method-assign, assignment]
            with self.elsewhere.watching(), self._attributes.of_stand_ins(self._asked_for):
                yield

    def _put_back_classes(self) -> None:
        self._active = False
        for cls, own in self._classes.items():
            _put_back(cls, own)

    def was_read(self, module: nn.Module, name: str) -> bool:
        """Whether the step read an attribute's value from before the step."""
        return self._noted.get((id(module), name), (None, ""))[0] is not None

    def was_used(self, module: nn.Module, name: str) -> bool:
        """Whether the step read an attribute that it had set itself."""
        return self._noted.get((id(module), name), (module, ""))[0] is None

    def was_written(self, module: nn.Module, name: str) -> bool:
        """Whether the step set an attribute, even to the same value."""
        return (id(module), name) in self._written

    def look_at_stack(self, frame: types.FrameType | None, until: str) -> None:
        """Note the functions that run, from ``frame`` down to those of the file ``until``."""
        while frame is not None and frame.f_code.co_filename != until:
            self._runs(frame.f_code, frame.f_globals)
            frame = frame.f_back

    def _runs(self, code: types.CodeType, table: dict[str, Any]) -> None:
        """Note a function that runs."""
        if id(code) not in self._seen:
            self._seen[id(code)] = code
            if is_users(code):
                self._names(code, table, None)
                file = sys.modules.get(table.get("__name__") or "")
                if file is not None and vars(file) is not table:  # exec, with a copy of its names
                    self._names(code, vars(file), None)
                if set(code.co_freevars) - {"__class__"}:
                    self._unresolved.append(code)

    def let_stand_for(self, twin: torch.Tensor, tensor: torch.Tensor) -> None:
        """Note that a stand-in is in the place of a tensor of the model."""
        self.stands_for[id(twin)] = tensor
        for name, value in vars(tensor).items():
            self._meet(value, name)

    def _asked_for(self, holder: Any, name: str) -> None:
        """Note what ``getattr`` or ``hasattr`` is asked for, of what is not watched."""
        if isinstance(holder, nn.Module):
            return
        if isinstance(holder, torch.Tensor):
            if name in dict_of(self.of_call.get(id(holder))):
                raise NotFittingError(
                    f"forward reads {name!r}, which somebody has put on a tensor of the call: a "
                    "plan does not look for attributes of the tensors that it is called with. "
                    "Pass the value as an argument of its own"
                )
            if id(holder) in self.stands_for:
                self._attributes.note(self.stands_for[id(holder)], name, "a tensor of the model")
            return
        named = isinstance(holder, _WITH_NAMES)  # of others, __getattr__ may do anything
        path = holder.__name__ if named else type(holder).__name__
        self._meet(holder, path)
        if isinstance(holder, types.MethodType):
            holder = holder.__func__
        if type(holder) in self._classes:
            return
        self._attributes.note(holder, name, path)
        if isinstance(holder, (types.FunctionType, *_NAMESPACES)):
            self._meet(vars(holder).get(name), f"{path}.{name}")

    def _asked_for_names(self, holder: Any) -> None:
        if isinstance(holder, type):
            self._attributes.note_names(holder)

    def _note(self, holder: Any, name: str) -> None:
        key = (id(holder), name)
        if key in self._noted or name.startswith("__") or threading.get_ident() != self._thread:
            return
        self._noted[key] = (holder, name)
        held = dict_of(holder)
        if name in held:
            before = self._own_before.get(id(holder))
            if before is not None and before.get(name, ABSENT) is not held[name]:
                self._noted[key] = (None, name)  # forward itself has put it there
                return
            self._meet(held[name], self._path(holder, name))
        else:
            self._meet(in_class(type(holder), name)[1], self._path(holder, name))

    def _path(self, holder: Any, name: str) -> str:
        path = self._name_of.get(id(holder), type(holder).__name__)
        return f"{path}.{name}" if path else name

    def _meet(self, value: Any, path: str, depth: int = 0) -> None:
        """Look into what was read: functions may be called, objects may be read."""
        if isinstance(value, types.ModuleType):
            self._modules.meet(value)
            return
        if type(value) in weakref.ProxyTypes:
            value = value.__repr__.__self__  # what it stands for
        if isinstance(value, (torch.Tensor, nn.Module)):
            return
        self.generators.meet(value, path)
        if isinstance(value, decimal.Decimal):
            self.elsewhere.note_decimals()
        if isinstance(value, types.FunctionType):
            if not depth or not is_library(value.__code__):  # a library's registry names hundreds
                self._function(value)
            if isinstance(registry := vars(value).get("registry"), types.MappingProxyType):
                self._registry(value, registry)
        elif isinstance(value, types.MethodType):
            self._meet(value.__func__, path)
            self._meet(value.__self__, path)
        elif isinstance(value, (staticmethod, classmethod)):
            self._meet(value.__func__, path)
        elif isinstance(value, property):
            self._meet(value.fget, path)
        elif isinstance(value, functools.cached_property):
            self._meet(value.func, path)
        elif isinstance(value, _CACHED):
            self._meet(value.__wrapped__, path)
        elif isinstance(value, weakref.ref):
            self._meet(value(), path, depth)
        elif isinstance(value, functools.partial):
            self._meet(value.func, path)
            self._meet((value.args, value.keywords), path, depth + 1)
        elif isinstance(value, WRAPPERS):
            if isinstance(value, ContextVar):
                self.outside.slot(value, "", value.name)
            for part in parts_of(value):
                self.outside.contents(part, path)
            self._meet(parts_of(value), path, depth + 1)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, CONTAINERS) and self._looks_into(value, depth):
            items = value if isinstance(value, (set, frozenset)) else entries_of(value)
            for key, item in zip(range(_MAX_MET), items, strict=False):
                at, inner = item if isinstance(item, tuple) and len(item) == 2 else (key, item)
                self._meet(inner, f"{path}[{at!r}]", depth + 1)
                if not isinstance(at, ATOMS):
                    self._meet(at, path, depth + 1)  # a key of a dict
        if not isinstance(value, ATOMS):
            self._object(value, path)

    def _looks_into(self, container: Any, depth: int) -> bool:
        if depth < _SURE_DEPTH:
            return True
        known = id(container) in self._deep or len(self._deep) > _MAX_MET
        self._deep[id(container)] = container
        return not known and depth < _MAX_DEPTH

    def _function(self, function: types.FunctionType) -> None:
        if id(function) in self._seen:
            return
        self._seen[id(function)] = function
        self._seen[id(function.__code__)] = function.__code__
        if is_users(function.__code__):
            self._names(function.__code__, function.__globals__, function)
            if not is_library(function.__code__):  # others are not edited while they run
                for part, words in _PARTS_OF_FUNCTIONS:
                    label = f"the {words} of {function.__qualname__}"
                    self._named[id(function), part] = (label, Where.ATTRIBUTE, function, part)
                self.outside.contents(vars(function), function.__qualname__, attributes=True)
            defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            self._meet(defaults, f"the defaults of {function.__qualname__}")
        self._meet(getattr(function, "__wrapped__", None), "")

    def _registry(self, function: types.FunctionType, registry: Any) -> None:
        """Note what is registered with a ``functools.singledispatch``."""
        if (id(function), "registry") not in self._named:
            label = f"what is registered with {function.__qualname__}"
            place = label, Where.DICT, weakly(function), "registry"
            self._named[id(function), "registry"] = place
            self._meet(registry, function.__qualname__)

    def _class(self, cls: type) -> None:
        if id(cls) in self._seen or not is_users_class(cls):
            return
        self._seen[id(cls)] = cls
        self._abstract = self._abstract or (isinstance(cls, abc.ABCMeta) and is_users_own(cls))
        self._remember_classes(cls)
        if is_users_class(type(cls)):
            self._class(type(cls))
        if issubclass(cls, torch.autograd.Function):
            for name in _RUN_BY_AUTOGRAD:
                self._meet(in_class(cls, name)[1], "")

    def _object(self, value: Any, path: str) -> None:
        cls = type(value)
        if id(value) in self._seen:
            return
        if isinstance(value, _NAMESPACES):
            self._seen[id(value)] = value
            self._name_of.setdefault(id(value), path)
            self.outside.attributes(value, path)
            self._note_all(value)
            return
        if isinstance(value, queue.Queue):
            self.outside.attributes(value, path)
        watchable = is_users_class(cls) or cls in _LIKE_USERS or isinstance(value, _PYTORCHS)
        if isinstance(value, enum.Enum) or not watchable:
            self._foreign.meet(value, path)
            return
        self._seen[id(value)] = value
        self._name_of.setdefault(id(value), path)
        self.outside.attributes(value, path)
        self._remember_classes(cls)
        self._meet(in_class(cls, "__call__")[1], "")
        changeable = cls.__flags__ & _HEAP_TYPE and not cls.__flags__ & _IMMUTABLE_TYPE
        if changeable and cls not in self._classes:
            self._classes[cls] = vars(cls).get("__getattribute__", ABSENT)
            if self._active:
                self._exchange(cls)
        if cls in self._unwatchable:
            self._note_all(value)

    def _remember_classes(self, cls: type) -> None:
        """Remember the contents of a class and its bases, but not those of installed packages."""
        for base in filter(is_users_class, cls.__mro__):
            if is_users_own(base):
                self.outside.names(base, base.__name__)

    def _note_all(self, value: Any) -> None:
        """Count every attribute that is named anywhere, of an object that cannot be watched."""
        for name in (*dict_of(value), *slots_of(value)):
            self._note(value, name)

    def _exchange(self, cls: Any) -> None:
        own, note = self._classes[cls], self._note

        def watched(holder: Any, name: str) -> Any:
            note(holder, name)
            if name in ALL_AT_ONCE:
                code = who_asks(sys._getframe(1))
                if code and not is_library(code):
                    self._asked_for_all[id(holder), id(code)] = (holder, code)
            if own is ABSENT:
                return super(cls, holder).__getattribute__(name)
            return own(holder, name)

        try:
            cls.__getattribute__ = watched
        except Exception:  # a metaclass that forbids changes may raise anything
            logger.debug("%s cannot be watched", cls, exc_info=True)
            del self._classes[cls]
            self._unwatchable.add(cls)
            for value in [value for value in self._seen.values() if type(value) is cls]:
                self._note_all(value)

    # -- what functions name -----------------------------------------------------

    def _names(
        self, code: types.CodeType, table: dict[str, Any], function: types.FunctionType | None
    ) -> None:
        self._words.update(words_in(code))
        self._strings.update(strings_in(code))
        if asks_past_classes(code):
            self._asks_past_classes(code)
        if not is_library(code):
            self._modules.imports_of(code, table.get("__package__"))
            self.clocks.look(code, table, [names[1:] for names in names_in(code) if not names[0]])
            if "globals" in code.co_names:
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
                self._named.setdefault(at, (f"global {name!r}", Where.TABLE, table, name))
            elif free and function is not None and function.__closure__ is not None:
                cell = function.__closure__[code.co_freevars.index(name)]
                label = f"{name!r} in the closure of {code.co_name}"
                self._follow(label, Where.ATTRIBUTE, cell, "cell_contents", attributes, code)

    def _asks_past_classes(self, code: types.CodeType) -> None:
        self._past_watching[id(code)] = code
        self._words.update(strings_in(code))

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
        if self.elsewhere.has_lent(value):
            return
        path = label.split("'")[1] if "'" in label else label
        if (value is decimal or value is decimal.Decimal) and not is_library(code):
            self.elsewhere.note_decimals()
        if isinstance(value, types.ModuleType):
            if (
                value is os
                and attributes
                and attributes[0] in _ENVIRONMENT
                and not is_library(code)
            ):
                label, where = "an environment variable", Where.ATTRIBUTE
                self._named[id(os.environ), "_data"] = (label, where, os.environ, "_data")
            if attributes and attributes[0] in vars(value) and may_change(value, attributes[0]):
                inside = f"'{value.__name__}.{attributes[0]}'"
                rest = attributes[1:]
                self._follow(inside, Where.TABLE, vars(value), attributes[0], rest, code)
            elif attributes and is_users_module(value) and not is_library(code):
                self._attributes.note(value, attributes[0], value.__name__)
            elif attributes and not is_library(code):
                self._chains.append((value, attributes, strings_in(code)))
            elif not attributes and not is_library(code):
                self._modules.meet(value)
            return
        library = is_library(code)
        if library and not isinstance(value, (*ATOMS, torch.Tensor)):
            return  # registries, loggers
        if library and isinstance(value, types.FunctionType) and where is Where.ATTRIBUTE:
            return  # what a decorator wraps
        self._named[id(holder), key] = (label, where, holder, key)
        if not library:
            self.outside.contents(value, path)
            if path in stored_in(code) and isinstance(holder, (dict, types.CellType)):
                self.outside.slot(holder, key, path)
        if isinstance(value, type):
            self._class(value)
            cls = in_class(value, attributes[0])[0] if attributes else None
            if attributes and cls is None and not library and not issubclass(value, enum.Enum):
                self._attributes.note(value, attributes[0], path)
            if cls is not None and is_users_class(cls):
                inside, table = f"'{path}.{attributes[0]}'", self._table(cls)
                self._follow(inside, Where.TABLE, table, attributes[0], attributes[1:], code)
        elif isinstance(value, types.FunctionType) and library:
            return  # an installed package: what else it calls is seen when it runs
        else:
            if isinstance(value, types.FunctionType) and attributes:
                name = attributes[0]
                at = Where.DICT if name in vars(value) else Where.SHADOW
                inside = f"'{path}.{name}'"
                self._named.setdefault((id(value), name), (inside, at, weakly(value), name))
            self._meet(value, path)

    def _table(self, cls: type) -> Any:
        return self._tables.setdefault(cls, vars(cls))

    # -- afterwards ----------------------------------------------------------------

    def reads(self) -> Reads:
        """Return what was read, with its values at the end of the trace."""
        for function in _functions_with(self._unresolved):
            self._names(function.__code__, function.__globals__, function)
        self._class_of_root()
        self._classes_of_holders()
        places: list[Place] = []
        noted = set(self._noted)
        for holder, name in list(self._noted.values()):
            if holder is None or (holder is self._root and name == "forward"):
                continue
            unwatched = isinstance(holder, _NAMESPACES) or type(holder) in self._unwatchable
            if unwatched and name not in self._words | self._strings:
                continue
            places += self._places_of(holder, name)
        for holder, code in self._asked_for_all.values():
            places += self._asked_by_key(holder, code, keys_asked(code), noted)
        for holder, code in self._asked_past_watching():
            places += self._asked_by_key(holder, code, None, noted)
        for module, name in self._modules.names(self._words | self._strings):
            label = f"'{module.__name__}.{name}'"
            at = id(vars(module)), name
            self._named.setdefault(at, (label, Where.TABLE, vars(module), name))
        self._attributes_of_functions()
        for label, where, holder, key in self._named.values():
            places.append(place_of(label, where, holder, key))
        places += self._modules.missing()
        places += self._attributes.places()
        places += self._of_tensors()
        places += [
            place_of("an array of the call", Where.ASKED, Ask(value, lambda array: array), "")
            for value in self._objects
            if isinstance(value, np.ndarray)
        ]
        places += self._foreign.places(self._words | self._strings)
        for chain in dict.fromkeys(self._chains):
            places += foreign_places(*chain)
        if self._abstract and self._words & {"isinstance", "issubclass"}:
            self.elsewhere.note_registered_classes()
        places += self.elsewhere.places()
        places.append(place_of(SETTINGS, Where.ATTRIBUTE, weakly(PROCESS_WIDE), "settings"))
        refuse_too_large(places)
        return Reads(places)

    def _of_tensors(self) -> Iterator[Place]:
        """Attributes that the loop has given to parameters and buffers, as far as named."""
        for tensor in self.stands_for.values():
            for name in dict_of(tensor).keys() & (self._words | self._strings):
                label = f"'{name}' of a tensor of the model"
                yield place_of(label, Where.DICT, weakly(tensor), name)

    def _attributes_of_functions(self) -> None:
        """Attributes of the functions that were met, as far as anything names them."""
        functions = [f for f in self._seen.values() if isinstance(f, types.FunctionType)]
        for function in functions:
            if is_library(function.__code__) or not is_users(function.__code__):
                continue
            for name in vars(function).keys() & (self._words | self._strings):
                label = f"'{function.__qualname__}.{name}'"
                place = label, Where.DICT, weakly(function), name
                self._named.setdefault((id(function), name), place)

    def _asked_by_key(
        self,
        holder: Any,
        code: types.CodeType,
        keys: frozenset[str] | None,
        noted: set[tuple[int, str]],
    ) -> Iterator[Place]:
        """Attributes that a function read from an object's dict, and those that it may miss there.

        Without ``keys``, a user's function may have read any.
        """
        held = dict_of(holder)
        before = self._own_before.get(id(holder), held)
        names = keys
        if names is None:
            names = frozenset(held)
            if is_library(code):
                names = names.intersection(code.co_consts) or names
            elif weakly(holder) is not holder:
                of = self._name_of.get(id(holder)) or type(holder).__name__
                known = (*held, "forward")  # where a plan is put
                yield nothing_added(f"what was added to {of}", weakly(holder), known)
        for name in names - _IGNORED:
            own = held.get(name, ABSENT) is before.get(name, ABSENT)  # not put there by forward
            if own and (id(holder), name) not in noted:
                yield from self._places_of(holder, name)

    def _asked_past_watching(self) -> list[tuple[Any, types.CodeType]]:
        """Objects that a function may have read past their classes, with the function's code.

        Its strings are the names, wherever they are found. A function that computes the
        names may have read any.
        """
        met = [value for value in self._seen.values() if is_users_class(type(value))]
        holders = [*self._root.modules(), *met]
        asked = []
        for code in self._past_watching.values():
            known = strings_in(code)
            found = [holder for holder in holders if known & dict_of(holder).keys()]
            asked += [(holder, code) for holder in found or ([] if is_library(code) else holders)]
        return asked

    def _class_of_root(self) -> None:
        """Note the class that defines the root's forward; the planner replaces the instance's."""
        cls = in_class(type(self._root), "forward")[0]
        if cls is not None:
            table = self._table(cls)
            label = f"'{cls.__name__}.forward'"
            self._named[id(table), "forward"] = (label, Where.TABLE, table, "forward")

    def _classes_of_holders(self) -> None:
        """Numbers that a class holds and that are read through ``cls`` or ``type(self)``."""
        classes = {type(holder) for holder, _ in self._noted.values()}
        classes |= {value for value in self._seen.values() if isinstance(value, type)}
        if self._past_watching:
            classes |= {type(value) for value in self._seen.values()}
        for cls in {base for each in classes for base in each.__mro__ if is_users_class(base)}:
            table = self._table(cls)
            for name, value in table.items():
                plain = isinstance(value, (*BY_VALUE, *CONTAINERS))
                if plain and name in self._words and not name.startswith("__"):
                    label = f"'{cls.__name__}.{name}'"
                    self._named[id(table), name] = (label, Where.TABLE, table, name)

    def _places_of(self, holder: Any, name: str) -> Iterable[Place]:
        label = f"attribute {self._path(holder, name)!r}"
        reference = weakly(holder)
        held = dict_of(holder)
        if name in held and reference is not holder:
            replaceable = self._path(holder, name) in self.replaceable
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
                key = id(self._table(base)), name
                label = f"'{base.__name__}.{name}'"
                self._named.setdefault(key, (label, Where.TABLE, self._table(base), name))


def _put_back(cls: Any, own: Any) -> None:
    if own is ABSENT:
        if "__getattribute__" in vars(cls):
            del cls.__getattribute__
    else:
        cls.__getattribute__ = own


def _functions_with(codes: list[types.CodeType]) -> list[types.FunctionType]:
    """Return the functions that have one of these codes, each of which may have other cells.

    The garbage collector knows them, but does not look among what a process has frozen
    (``gc.freeze``), so that is undone. Freezing it again would keep this capture for ever.
    """
    if not codes:
        return []
    gc.unfreeze()
    known = {id(code) for code in codes}
    return [
        holder
        for holder in gc.get_referrers(*codes)
        if isinstance(holder, types.FunctionType) and id(holder.__code__) in known
    ]
