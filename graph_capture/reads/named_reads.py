"""Find what a function names outside itself: globals, closure cells, and their attributes.

``TAU``, ``config.gain``, ``Scale.k`` are found in the bytecode, where a name is
followed by the attributes read from it. Other ways of reading (``getattr`` with a
computed name, an object that was first put into a local variable) are not found
there. Attributes of objects are then seen while the function runs, see
:mod:`~graph_capture.reads.reading`.
"""

from __future__ import annotations

import dis
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from functools import lru_cache

from ..lines import OWN_ROOTS, TORCH_ROOT

# Packages lie in other places as well: the user's own, Debian's, those below a virtual environment.
_LIBRARY_ROOTS = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
_LIBRARY_FOLDERS = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_STANDARD_ROOT = sysconfig.get_paths()["stdlib"]
_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_FREE = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})
_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})


PAST_CLASSES = frozenset({"__getattribute__", "getattr_static"})
"""Names of functions that get at attributes past the ``__getattribute__`` of a class."""


def is_users(code: types.CodeType) -> bool:
    """Whether a function belongs to neither PyTorch, Python nor this project."""
    return is_users_file(code.co_filename)


def is_library(code: types.CodeType) -> bool:
    """Whether a function comes from an installed package."""
    return is_library_file(code.co_filename)


@lru_cache(maxsize=4096)
def is_library_file(name: str) -> bool:
    """Whether a file is one of an installed package."""
    return name.startswith(_LIBRARY_ROOTS) or any(folder in name for folder in _LIBRARY_FOLDERS)


@lru_cache(maxsize=4096)
def is_users_file(name: str) -> bool:
    """Whether a file belongs to neither PyTorch, Python nor this project."""
    if name.startswith(("<frozen", "<eval_with_key>", "<__array_function__", TORCH_ROOT)):
        return False
    if name.startswith(OWN_ROOTS):
        return False
    return is_library_file(name) or not name.startswith(_STANDARD_ROOT)


def is_users_class(cls: type) -> bool:
    """Whether a class belongs to neither PyTorch nor Python."""
    root = (cls.__module__ or "").partition(".")[0]
    return root == "__main__" or (root != "torch" and root not in sys.stdlib_module_names)


def is_users_own(cls: type) -> bool:
    """Whether a class is of no installed package."""
    module = sys.modules.get(cls.__module__)
    return not is_library_file(getattr(module, "__file__", None) or "")


@lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> tuple[tuple[bool, str, tuple[str, ...]], ...]:
    """For each name: whether it is a free variable, the name, and the chain of attributes read.

    Includes those of functions inside the function.
    """
    found: dict[tuple[bool, str, tuple[str, ...]], None] = {}
    for function in with_inner(code):
        name, free, chain = "", False, []
        for instruction in dis.get_instructions(function):
            if name and instruction.opname in _ATTRIBUTE:
                chain.append(str(instruction.argval))
                continue
            if name:
                found[free, name, tuple(chain)] = None
            name, chain = "", []
            if instruction.opname in _GLOBAL:
                name, free = str(instruction.argval), False
            elif instruction.opname in _FREE and instruction.argval in code.co_freevars:
                name, free = str(instruction.argval), True
        if name:
            found[free, name, tuple(chain)] = None
    for name in stored_in(code):
        found.setdefault((name in code.co_freevars, name, ()))
    return tuple(found)


@lru_cache(maxsize=4096)
def stored_in(code: types.CodeType) -> frozenset[str]:
    """Globals and free variables that a function assigns to."""
    return frozenset(
        str(instruction.argval)
        for function in with_inner(code)
        for instruction in dis.get_instructions(function)
        if instruction.opname == "STORE_GLOBAL"
        or (instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars)
    )


@lru_cache(maxsize=4096)
def words_in(code: types.CodeType) -> frozenset[str]:
    """Every name of a global or an attribute that occurs in a function."""
    return frozenset(name for function in with_inner(code) for name in function.co_names)


@lru_cache(maxsize=4096)
def strings_in(code: types.CodeType) -> frozenset[str]:
    """Identifiers that occur in a function as strings, as ``getattr(x, "gain")`` has them."""
    return frozenset(
        word
        for function in with_inner(code)
        for word in function.co_consts
        if isinstance(word, str) and word.isidentifier()
    )


@lru_cache(maxsize=4096)
def asks_past_classes(code: types.CodeType) -> bool:
    """Whether a function reads attributes as ``object.__getattribute__(x, "gain")`` does.

    Methods that a class defines under these names do not count: they read what they
    were asked for themselves.
    """
    answers = code.co_name in ("__getattribute__", "__getattr__")
    return not answers and bool(PAST_CLASSES & words_in(code))


def with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from with_inner(constant)
