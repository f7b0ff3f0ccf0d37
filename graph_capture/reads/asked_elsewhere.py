"""Questions that forward puts to Python and PyTorch, whose answers may change.

How many threads run, whether a file is there, whether an event is set, whether a function
has an attribute: such answers lie in no attribute that a class could be watched for. So
while a step is traced, a profile function sees which functions of the standard library and
of PyTorch the user's own functions call, and ``getattr``, ``hasattr``, ``dir`` and ``open``
are exchanged in the user's files. What was asked is asked again before each step, so a
question must be known to change nothing: there is a list of them.

Known imperfection: nothing is seen while another profiler is at work, nor what an installed
package asks.
"""

from __future__ import annotations

import abc
import builtins
import decimal
import gc
import importlib
import inspect
import io
import linecache
import logging
import os
import random
import sys
import threading
import tokenize
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import NotFittingError
from ..private_torch.modules import buffers_of, parameters_of
from .ledger import LENT
from .named_reads import is_library_file, is_users_file
from .reads import Ask, Place, Where, place_of

_OF_PYTHON = {
    "logging": {"Logger.isEnabledFor", "Logger.getEffectiveLevel", "Logger.hasHandlers"},
    "threading": {"Event.is_set", "active_count", "Thread.is_alive", "Thread.name"},
    "queue": {"Queue.qsize", "Queue.empty", "Queue.full"},
    "locale": {"setlocale", "getlocale", "localeconv"},
    "multiprocessing.process": {"current_process"},
}
_OF_NUMPY = frozenset({"geterr", "get_printoptions", "geterrcall", "getbufsize"})
_IN_C: dict[Any, str] = {
    decimal.getcontext: "decimal's context",
    gc.isenabled: "whether garbage is collected",
    gc.get_threshold: "the collector's thresholds",
    os.getcwd: "the working directory",
    sys.getrecursionlimit: "the recursion limit",
    sys.gettrace: "the trace function",
}
_OF_OBJECTS_IN_C = frozenset({"locked", "qsize", "empty", "full", "_is_owned"})
_OBJECTS_IN_C = ("_thread", "_queue", "_multiprocessing")
_ASKS_BEGIN = ("get_", "is_", "are_", "initial_seed")
_ASKS_END = ("_enabled", "_available")
# They cannot change, or are compared elsewhere, or are costly.
_NOT_OF_TORCH = (
    "torch.cuda",
    "torch.jit",
    "torch.onnx",
    "torch.compiler",
    "torch.fx",
    "torch.nn",
    "torch._dynamo",
    "torch._jit_internal",
    "torch.overrides",
    "torch.random.get_rng",
    "torch.utils._",
)
_NOT_ASKED_AGAIN = frozenset(
    {
        "get_rng_state",
        "is_grad_enabled",
        "is_inference_mode_enabled",
        "is_autocast_enabled",
        "is_autocast_cpu_enabled",
        "get_autocast_dtype",
        "is_tensor",
        "is_storage",
    }
)
_LISTS_STATE = frozenset(
    f"Module.{name}"
    for name in (
        *("parameters", "named_parameters", "buffers", "named_buffers"),
        *("state_dict", "get_parameter", "get_buffer"),
    )
)
_READ_FOR_MESSAGES = frozenset(
    module.__file__ for module in (linecache, tokenize, inspect, traceback, warnings, logging)
)
_READ_FILES = frozenset({"numpy", "yaml", "pandas", "scipy", "PIL"})
_STAT = os.stat
_WHAT_THEY_TAKE = (os.supports_fd, os.supports_dir_fd, os.supports_follow_symlinks)
_ENVIRONMENT = type(os.environ).__getitem__.__code__
_SEED = random.Random.seed.__code__
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def file_state(path: Any) -> Any:
    """What tells whether a file or a directory was changed; an error's name if it is not there."""
    try:
        found = _STAT(path)
    except (OSError, ValueError) as error:
        return type(error).__name__
    return found.st_mtime_ns, found.st_size, found.st_mode, found.st_ino


def num_state(module: nn.Module) -> int:
    """How many parameters and buffers a module has, those of its parts included."""
    count = 0
    for part in module.modules():
        count += sum(each is not None for each in parameters_of(part).values())
        count += sum(each is not None for each in buffers_of(part).values())
    return count


class AskedElsewhere:
    """Collects the questions of the user's functions while :meth:`watching`.

    Parameters
    ----------
    on_function
        Called with the code and the globals of each of the user's functions that runs,
        before it runs for the first time.
    on_attribute
        Called with an object and the name of an attribute that ``getattr`` or ``hasattr``
        is asked for.
    on_names
        Called with an object whose names ``dir`` is asked for.
    real
        Returns what a stand-in is in the place of, and any other object itself.
    on_object
        Called with each object of the standard library one of whose methods is called.
    """

    def __init__(
        self,
        on_function: Callable[[types.CodeType, dict[str, Any]], None],
        on_attribute: Callable[[Any, str], None],
        on_names: Callable[[Any], None],
        real: Callable[[Any], Any],
        on_object: Callable[[Any], None],
    ) -> None:
        self._on_function, self._on_attribute = on_function, on_attribute
        self._on_names, self._real, self._on_object = on_names, real, on_object
        self._kinds: dict[int, tuple[types.CodeType, bool]] = {}  # whether it is the user's own
        self._met: set[int] = set()  # ids of codes in _kinds
        self._asks: dict[Any, tuple[str, Ask]] = {}
        self._keys: set[str] = set()  # of the environment
        self._undo: list[tuple[dict[str, Any], str, Any]] = []
        self._tables: set[int] = set()
        self.drawn: str | None = None  # where numbers without a seed were drawn
        self._thread = threading.get_ident()
        self._instead = self._exchanged()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While active, questions are noted."""
        self._thread = threading.get_ident()
        LENT.update(map(id, self._instead.values()))
        of_files: list[tuple[Any, str]] = [
            *((os, name) for name in ("stat", "lstat", "listdir", "scandir", "access")),
            (io, "open"),
            (builtins, "open"),
        ]
        before = [getattr(module, name) for module, name in of_files]
        listed = []
        for (module, name), own in zip(of_files, before, strict=True):
            instead = self._open(own) if name == "open" else self._of_path(own)
            setattr(module, name, instead)
            listed += [(known, instead) for known in _WHAT_THEY_TAKE if own in known]
        for known, instead in listed:
            known.add(instead)
        for table in _tables_of_users():  # before forward runs, which may go through one of them
            self._exchange(table)
        callbacks = list(gc.callbacks)  # they run whenever memory is low, and forward asks nothing
        gc.callbacks.clear()
        profiler = sys.getprofile()
        if profiler is None:
            sys.setprofile(self._profile)
        try:
            yield
        finally:
            if profiler is None:
                sys.setprofile(None)
            gc.callbacks[:0] = callbacks
            for known, instead in listed:
                known.discard(instead)
            for (module, name), own in zip(of_files, before, strict=True):
                setattr(module, name, own)
            for table, name, own in reversed(self._undo):
                if own is None:
                    table.pop(name, None)
                else:
                    table[name] = own
            self._undo.clear()
            LENT.difference_update(map(id, self._instead.values()))
            self._tables.clear()

    def let_go(self) -> None:
        """Forget who is told of questions: the collector may come late, and objects stay."""
        self._on_function = self._on_attribute = _nobody
        self._on_names = self._real = self._on_object = _nobody
        self._instead.clear()

    def places(self) -> Iterator[Place]:
        """Each question, with its answer now."""
        for label, ask in self._asks.values():
            yield place_of(label, Where.ASKED, ask, "")
        table = vars(os.environ)["_data"]
        for key in self._keys:
            label = f"environment variable {key!r}"
            yield place_of(label, Where.TABLE, table, os.environ.encodekey(key))

    def refuse_draws(self) -> None:
        """Refuse a step that made random numbers for which there is no seed.

        Raises
        ------
        NotFittingError
            Names the function that did.
        """
        if self.drawn is not None:
            raise NotFittingError(
                f"forward draws random numbers without a seed ({self.drawn}: os.urandom, uuid, "
                "secrets, or a new generator of Python's): a plan would repeat this one draw for "
                "ever. Draw with torch, or outside and pass the numbers as an argument"
            )

    def has_lent(self, value: Any) -> bool:
        """Whether a value of a user's file is there for the time of the capture only."""
        return id(value) in LENT

    def note_decimals(self) -> None:
        """Note that the step may compute with decimal numbers, which ask for their context."""
        self._note(_IN_C[decimal.getcontext], Ask(decimal, "getcontext", (), {}))

    def note_registered_classes(self) -> None:
        """Note that the step may ask whether a class is registered with an abstract one."""
        self._note("the classes registered with abstract classes", Ask(abc, "get_cache_token"))

    # -- while the step runs -----------------------------------------------------

    def _users_own(self, frame: types.FrameType) -> bool:
        code = frame.f_code
        known = self._kinds.get(id(code))
        if known is None:
            known = self._kinds[id(code)] = code, _is_users_own(code, frame.f_globals)
        return known[1]

    def _profile(self, frame: types.FrameType, event: str, function: Any) -> None:
        if event == "call":
            code, caller = frame.f_code, frame.f_back
            if self._users_own(frame):
                if id(code) not in self._met:
                    self._met.add(id(code))
                    self._exchange(frame.f_globals)
                    self._on_function(code, frame.f_globals)
            elif code is _ENVIRONMENT:
                if self._who_asks(caller) is not None and isinstance(frame.f_locals["key"], str):
                    self._keys.add(frame.f_locals["key"])
            elif code is _SEED:
                if frame.f_locals["a"] is None:
                    self._draws(caller)
            elif caller is not None and self._users_own(caller):
                self._python_is_asked(frame)
        elif event == "c_call":
            if function is os.urandom:
                self._draws(frame)
            elif self._users_own(frame):
                self._c_is_asked(function)

    def _exchange(self, table: dict[str, Any]) -> None:
        """Put the functions that note questions in the place of Python's own in a user's file."""
        if id(table) in self._tables:
            return
        self._tables.add(id(table))
        for name, instead in self._instead.items():
            own = vars(builtins)[name]
            if name not in table or table[name] is own:
                self._undo.append((table, name, table.get(name)))
                table[name] = instead

    def _who_asks(self, frame: types.FrameType | None) -> types.CodeType | None:
        """The user's own function that asks, itself or by the standard library."""
        while frame is not None:
            code = frame.f_code
            if code.co_filename in _READ_FOR_MESSAGES:
                return None
            if self._users_own(frame):
                return code
            name = (frame.f_globals.get("__name__") or "").partition(".")[0]
            if name not in sys.stdlib_module_names and name not in _READ_FILES:
                return None
            frame = frame.f_back
        return None

    def _draws(self, frame: types.FrameType | None) -> None:
        code = self._who_asks(frame)
        if code is not None and self.drawn is None:
            self.drawn = f"{code.co_filename.rpartition('/')[2]}, in {code.co_name}"

    def _python_is_asked(self, frame: types.FrameType) -> None:
        code, module = frame.f_code, frame.f_globals.get("__name__") or ""
        name = code.co_qualname
        root = module.partition(".")[0]
        owner: Any = frame.f_locals[code.co_varnames[0]] if code.co_argcount else None
        if name in _LISTS_STATE and isinstance(owner, nn.Module):
            label = f"the number of parameters and buffers of a {type(owner).__name__}"
            self._note(label, Ask(owner, num_state))
            return
        if root in sys.stdlib_module_names and type(owner).__module__ == module:
            self._on_object(owner)
        if root == "torch":
            known = _asks_torch(module, name)
        elif root == "numpy":
            known = name in _OF_NUMPY
        else:
            known = name in _OF_PYTHON.get(module, ())
        if not known or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
            return
        held, count = frame.f_locals, code.co_argcount
        given = [held[each] for each in code.co_varnames[:count]]
        only = code.co_varnames[count : count + code.co_kwonlyargcount]
        named = {each: held[each] for each in only}
        owner = sys.modules.get(module)
        if "." in name:
            owner, *given = given
        if (module, name) == ("locale", "setlocale") and given[1] is not None:
            return  # it sets
        if all(isinstance(each, _PLAIN) for each in (*given, *named.values())):
            label = f"the answer of {module}.{name}"
            self._note(label, Ask(owner, code.co_name, tuple(given), named))

    def _c_is_asked(self, function: Any) -> None:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, types.ModuleType):
            of_torch = owner.__name__ == "torch._C" and _asks_torch("torch", name)
            if of_torch or function in _IN_C:
                label = _IN_C.get(function, f"the answer of torch.{name}")
                self._note(label, Ask(owner, name, (), {}))
        elif name in _OF_OBJECTS_IN_C and type(owner).__module__ in _OBJECTS_IN_C:
            label = f"the answer of {type(owner).__name__}.{name}"
            self._note(label, Ask(owner, name, (), {}))

    def _note(self, label: str, ask: Ask) -> None:
        self._asks.setdefault(ask.identity, (label, ask))

    # -- exchanged functions -------------------------------------------------------

    def _exchanged(self) -> dict[str, Callable[..., Any]]:
        """Functions that note what they are asked, by the names of Python's own."""

        def is_mine(name: Any) -> bool:
            return threading.get_ident() == self._thread and isinstance(name, str)

        def asked_getattr(holder: Any, name: str, *default: Any) -> Any:
            if is_mine(name):
                self._on_attribute(holder, name)
            return getattr(holder, name, *default)

        def asked_hasattr(holder: Any, name: str) -> bool:
            if is_mine(name):
                self._on_attribute(holder, name)
            return hasattr(holder, name)

        def asked_dir(*holder: Any) -> list[str]:
            if not holder:
                return sorted(sys._getframe(1).f_locals)
            if is_mine(""):
                self._on_names(*holder)
            return dir(*holder)

        return {
            "getattr": asked_getattr,
            "hasattr": asked_hasattr,
            "dir": asked_dir,
            "id": lambda value: id(self._real(value)),
            "open": self._open(builtins.open),
        }

    def _of_path(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def asked(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            self._note_path(path, sys._getframe(1))
            return own(path, *args, **kwargs)

        return asked

    def _open(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(mode, str) and not set(mode) & set("wax+"):
                self._note_path(file, sys._getframe(1))
            return own(file, mode, *args, **kwargs)

        return opened

    def _note_path(self, path: Any, frame: types.FrameType) -> None:
        plain = isinstance(path, (str, bytes, os.PathLike))
        if plain and threading.get_ident() == self._thread and self._who_asks(frame) is not None:
            path = os.fspath(path)
            ask = Ask(importlib.import_module(__name__), "file_state", (path,), {})
            self._note(f"the state of the file {path!r}", ask)


def _is_users_own(code: types.CodeType, table: dict[str, Any]) -> bool:
    """Whether a function is the user's, and of no installed package."""
    name = code.co_filename
    if name.startswith("<"):  # written by a program, such as the __init__ of a dataclass
        owner = table.get("__name__") or ""
        name = getattr(sys.modules.get(owner), "__file__", None) or name
        if owner.startswith("namedtuple_"):
            return False
    return is_users_file(name) and not is_library_file(name)


def _tables_of_users() -> list[dict[str, Any]]:
    """The names of each of the user's files that is imported."""
    found = []
    for module in list(sys.modules.values()):
        table: dict[str, Any] = vars(module) if isinstance(module, types.ModuleType) else {}
        name = table.get("__file__")
        if isinstance(name, str) and is_users_file(name) and not is_library_file(name):
            found.append(table)
    return found


def _nobody(*_told: Any) -> None:
    """Stand in for who is told, once the capture is over."""


def _asks_torch(module: str, name: str) -> bool:
    if module.startswith(_NOT_OF_TORCH) or "." in name or name in _NOT_ASKED_AGAIN:
        return False
    return name.startswith(_ASKS_BEGIN) or name.endswith(_ASKS_END)


@contextmanager
def not_watched() -> Iterator[None]:
    """While active, the calls of this thread are not looked at: PyTorch's own, of which a
    capture has hundreds of thousands."""
    profiler = sys.getprofile()
    watches = isinstance(profiler, types.MethodType) and isinstance(
        profiler.__self__, AskedElsewhere
    )
    if not watches:  # somebody else's, which may be written in C and could not be put back
        yield
        return
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(profiler)


__all__ = ["AskedElsewhere", "file_state", "not_watched"]
