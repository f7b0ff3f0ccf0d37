"""Functions of Python, NumPy and PyTorch that answer a question and change nothing.

What was asked is asked again before each step, so there is a list of them.
"""

from __future__ import annotations

import abc
import decimal
import gc
import inspect
import os
import sys
import types
from typing import Any

import torch
from torch import nn

from ..private_torch.modules import buffers_of, parameters_of
from .reads import Ask

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
_STAT = os.stat
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

Question = tuple[str, Ask]
"""A question in words, and how to ask it again."""


def question_to_python(frame: types.FrameType) -> Question | None:
    """The question that the call of a function written in Python is, if it is one."""
    code, module = frame.f_code, frame.f_globals.get("__name__") or ""
    name = code.co_qualname
    root = module.partition(".")[0]
    owner: Any = frame.f_locals[code.co_varnames[0]] if code.co_argcount else None
    if name in _LISTS_STATE and isinstance(owner, nn.Module):
        label = f"the number of parameters and buffers of a {type(owner).__name__}"
        return label, Ask(owner, num_state)
    if root == "torch":
        known = _asks_torch(module, name)
    elif root == "numpy":
        known = name in _OF_NUMPY
    else:
        known = name in _OF_PYTHON.get(module, ())
    if not known or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        return None
    held, count = frame.f_locals, code.co_argcount
    given = [held[each] for each in code.co_varnames[:count]]
    only = code.co_varnames[count : count + code.co_kwonlyargcount]
    named = {each: held[each] for each in only}
    owner = sys.modules.get(module)
    if "." in name:
        owner, *given = given
    if (module, name) == ("locale", "setlocale") and given[1] is not None:
        return None  # it sets
    if not all(isinstance(each, _PLAIN) for each in (*given, *named.values())):
        return None
    return f"the answer of {module}.{name}", Ask(owner, code.co_name, tuple(given), named)


def question_to_c(function: Any) -> Question | None:
    """The question that the call of a function written in C is, if it is one."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if isinstance(owner, types.ModuleType):
        of_torch = owner.__name__ == "torch._C" and _asks_torch("torch", name)
        if of_torch or function in _IN_C:
            label = _IN_C.get(function, f"the answer of torch.{name}")
            return label, Ask(owner, name, (), {})
    elif name in _OF_OBJECTS_IN_C and type(owner).__module__ in _OBJECTS_IN_C:
        return f"the answer of {type(owner).__name__}.{name}", Ask(owner, name, (), {})
    return None


def question_of_file(path: str | bytes) -> Question:
    """The question what a file or a directory is like."""
    return f"the state of the file {path!r}", Ask(sys.modules[__name__], "file_state", (path,), {})


def question_of_decimals() -> Question:
    """What computing with decimal numbers asks."""
    return _IN_C[decimal.getcontext], Ask(decimal, "getcontext", (), {})


def question_of_classes() -> Question:
    """What asking whether a class is registered with an abstract one asks."""
    return "the classes registered with abstract classes", Ask(abc, "get_cache_token")


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


def _asks_torch(module: str, name: str) -> bool:
    if module.startswith(_NOT_OF_TORCH) or "." in name or name in _NOT_ASKED_AGAIN:
        return False
    return name.startswith(_ASKS_BEGIN) or name.endswith(_ASKS_END)


__all__ = [
    "Question",
    "file_state",
    "num_state",
    "question_of_classes",
    "question_of_decimals",
    "question_of_file",
    "question_to_c",
    "question_to_python",
]
