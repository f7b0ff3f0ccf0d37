"""Code that asks for all attributes of an object at once, by ``vars()``, ``dir()`` or a copy."""

from __future__ import annotations

import copy
import copyreg
import dis
import inspect
import pickle
import types
from functools import lru_cache
from pathlib import Path

from torch import nn

from .named_reads import is_users, with_inner

ALL_AT_ONCE = frozenset({"__dict__", "__getstate__", "__reduce__", "__reduce_ex__"})
"""Attributes that give all others."""

_COPIERS = frozenset({copy.__file__, copyreg.__file__, inspect.__file__, pickle.__file__})
_PASSED = _COPIERS | {str(Path(__file__).with_name("exchanged_functions.py"))}
_NO_STEP = frozenset({"CACHE", "PRECALL", "PUSH_NULL", "NOT_TAKEN"})
_BY_KEY = frozenset({"get", "pop", "__getitem__", "__contains__"})
_SUBSCRIPTS = frozenset({"BINARY_SUBSCR", "STORE_SUBSCR", "DELETE_SUBSCR"})
_CONSTANT = frozenset({"LOAD_CONST", "LOAD_SMALL_INT"})


@lru_cache(maxsize=4096)
def keys_asked(code: types.CodeType) -> frozenset[str] | None:
    """The names by which a function asks ``x.__dict__`` or ``vars(x)``; ``None`` if any may be.

    Names are known where each use is like ``vars(x)["gain"]``, ``vars(x).get("gain")`` or
    ``"gain" in vars(x)``.
    """
    asked: set[str] = set()
    for function in with_inner(code):
        steps = [i for i in dis.get_instructions(function) if i.opname not in _NO_STEP]
        for at, step in enumerate(steps):
            if step.argval not in ("__dict__", "vars") or not step.opname.startswith("LOAD_"):
                continue
            end = at
            if step.argval == "vars":
                end = next((n for n in range(at, len(steps)) if steps[n].opname == "CALL"), at)
            after = steps[end + 1 : end + 5]
            if after[0].opname == "CONTAINS_OP":
                key = steps[at - 2 if step.argval == "__dict__" else at - 1]
            elif after[1].opname in _SUBSCRIPTS or after[1].argrepr == "[]":
                key = after[0]
            elif after[0].argval in _BY_KEY and _calls_with_constants(after[1:]):
                key = after[1]
            else:
                return None
            if key.opname != "LOAD_CONST" or not isinstance(key.argval, str):
                return None
            asked.add(key.argval)
    return frozenset(asked) if asked else None


def _calls_with_constants(steps: list[dis.Instruction]) -> bool:
    names = [step.opname for step in steps]
    return "CALL" in names and set(names[: names.index("CALL")]) <= _CONSTANT


def who_asks(frame: types.FrameType | None) -> types.CodeType | None:
    """The user's function that asks, itself or by one that copies or lists."""
    listing = nn.Module.__dir__.__code__
    while frame is not None and (frame.f_code is listing or frame.f_code.co_filename in _PASSED):
        frame = frame.f_back
    return frame.f_code if frame is not None and is_users(frame.f_code) else None
