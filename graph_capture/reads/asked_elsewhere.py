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

import gc
import inspect
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

from ..errors import NotFittingError
from .exchanged_functions import ExchangedFunctions
from .known_questions import (
    Question,
    question_of_classes,
    question_of_decimals,
    question_of_file,
    question_to_c,
    question_to_python,
)
from .named_reads import is_library_file, is_users_file
from .reads import Place, Where, place_of

_READ_FOR_MESSAGES = frozenset(
    module.__file__ for module in (linecache, tokenize, inspect, traceback, warnings, logging)
)
_READ_FILES = frozenset({"numpy", "yaml", "pandas", "scipy", "PIL"})
_ENVIRONMENT = type(os.environ).__getitem__.__code__
_SEED = random.Random.seed.__code__


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
        self._on_function, self._on_object = on_function, on_object
        self._kinds: dict[int, tuple[types.CodeType, bool]] = {}  # whether it is the user's own
        self._met: set[int] = set()  # ids of codes in _kinds
        self._asks: dict[Any, Question] = {}
        self._keys: set[str] = set()  # of the environment
        self.drawn: str | None = None  # where numbers without a seed were drawn
        self._thread = threading.get_ident()
        self._exchanged = ExchangedFunctions(on_attribute, on_names, self._asks_path, real)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While active, questions are noted."""
        self._thread = threading.get_ident()
        with self._exchanged.active():
            callbacks = list(gc.callbacks)  # run whenever memory is low, and forward asks nothing
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

    def let_go(self) -> None:
        """Forget who is told of questions: the collector may come late, and objects stay."""
        self._on_function = self._on_object = _nobody
        self._exchanged.let_go()

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

    def note_decimals(self) -> None:
        """Note that the step may compute with decimal numbers, which ask for their context."""
        self._note(question_of_decimals())

    def note_registered_classes(self) -> None:
        """Note that the step may ask whether a class is registered with an abstract one."""
        self._note(question_of_classes())

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
                    self._exchanged.exchange(frame.f_globals)
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
                self._note(question_to_c(function))

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
        if code.co_argcount and module.partition(".")[0] in sys.stdlib_module_names:
            owner = frame.f_locals[code.co_varnames[0]]
            if type(owner).__module__ == module:
                self._on_object(owner)
        self._note(question_to_python(frame))

    def _note(self, question: Question | None) -> None:
        if question is not None:
            self._asks.setdefault(question[1].identity, question)

    def _asks_path(self, path: Any, frame: types.FrameType) -> None:
        plain = isinstance(path, (str, bytes, os.PathLike))
        if plain and threading.get_ident() == self._thread and self._who_asks(frame) is not None:
            self._note(question_of_file(os.fspath(path)))


def _is_users_own(code: types.CodeType, table: dict[str, Any]) -> bool:
    """Whether a function is the user's, and of no installed package."""
    name = code.co_filename
    if name.startswith("<"):  # written by a program, such as the __init__ of a dataclass
        owner = table.get("__name__") or ""
        name = getattr(sys.modules.get(owner), "__file__", None) or name
        if owner.startswith("namedtuple_"):
            return False
    return is_users_file(name) and not is_library_file(name)


def _nobody(*_told: Any) -> None:
    """Stand in for who is told, once the capture is over."""


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


__all__ = ["AskedElsewhere", "not_watched"]
