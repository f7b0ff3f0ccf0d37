"""User files that a function reaches other than through its own globals.

``import settings`` inside forward, ``self.settings.GAIN``, ``getattr(settings, "GAIN")``:
reads of a module's attributes are not seen, because modules cannot be watched. So for
each module that was met, every name counts that occurs in the functions that were met.
"""

from __future__ import annotations

import dis
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .holders import is_users_module
from .named_reads import is_library_file, with_inner
from .reads import Place, Where, place_of
from .snapshots import BY_VALUE, CONTAINERS

_FOLLOWED = (*BY_VALUE, *CONTAINERS, types.FunctionType, type, torch.Tensor)


class ModulesMet:
    """The modules that functions have accessed.

    Parameters
    ----------
    remember
        Called with the globals of each module, before anything is written to them, and its name.
    foreign
        Called with each module that is not the user's.
    """

    def __init__(
        self,
        remember: Callable[[Any, str], None],
        foreign: Callable[[types.ModuleType], None],
    ) -> None:
        self._remember, self._foreign = remember, foreign
        self._met: dict[int, types.ModuleType] = {}
        self._imports: dict[int, tuple[types.CodeType, str | None]] = {}

    def meet(self, module: types.ModuleType) -> None:
        """Record a module if it is the user's."""
        if not isinstance(module, types.ModuleType):
            return  # what somebody has put into sys.modules
        if is_users_module(module):
            self._met[id(module)] = module
            if not is_library_file(getattr(module, "__file__", None) or ""):
                self._remember(vars(module), module.__name__)
        else:
            self._foreign(module)

    def imports_of(self, code: types.CodeType, package: str | None) -> None:
        """Record the modules that a function imports while it runs."""
        self._imports[id(code)] = (code, package)
        self._meet_imported(code, package)

    def names(self, words: set[str]) -> Iterator[tuple[types.ModuleType, str]]:
        """Each module with each of ``words`` that may have been read from it."""
        for code, package in self._imports.values():
            self._meet_imported(code, package)
        todo = list(self._met.values())
        while todo:
            module = todo.pop()
            library = is_library_file(getattr(module, "__file__", None) or "")
            for name in words & vars(module).keys():
                value = vars(module)[name]
                if isinstance(value, types.ModuleType):
                    if id(value) not in self._met and is_users_module(value):
                        self._met[id(value)] = value
                        todo.append(value)
                elif isinstance(value, BY_VALUE if library else _FOLLOWED):
                    yield module, name

    def missing(self) -> Iterator[Place]:
        """Modules that the user's own functions import, as far as they are not there."""
        for code, package in self._imports.values():
            for name in _imported_in(code, package, named=True):
                if name not in sys.modules:
                    yield place_of(f"module {name!r}", Where.TABLE, sys.modules, name)

    def _meet_imported(self, code: types.CodeType, package: str | None) -> None:
        for name in _imported_in(code, package):
            if name in sys.modules:
                self.meet(sys.modules[name])


def _imported_in(
    code: types.CodeType, package: str | None, *, named: bool = False
) -> Iterator[str]:
    """Full names of the modules that a function imports, and of those that it may name.

    With ``named``, only those of import statements, without the names taken from them.
    """
    for function in with_inner(code):
        loaded: list[Any] = []
        for instruction in dis.get_instructions(function):
            if instruction.opname != "IMPORT_NAME":
                loaded = [*loaded[-1:], instruction.argval]
                continue
            level, names = loaded if len(loaded) == 2 else (0, None)
            name = str(instruction.argval)
            if level and package:
                name = importlib.util.resolve_name("." * level + name, package)
            yield name
            if not named:
                yield from (f"{name}.{each}" for each in names or ())
        if not named:
            yield from (word for word in function.co_consts if isinstance(word, str))


__all__ = ["ModulesMet"]
