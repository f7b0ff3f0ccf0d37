"""Allow one capture at a time per process.

While a step is captured, PyTorch and Transformers are patched in places that all
threads share (global module hooks, checkpointing, ``is_compiling()``, the
allocator's record), and the model holds stand-ins. A second thread that captures
waits for the first. A thread that trains meanwhile must not share the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_capturing = threading.RLock()


def holds_capture_lock(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function: it waits until no other thread runs a decorated function."""

    @wraps(function)
    def waiting(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _capturing:
            return function(*args, **kwargs)

    return waiting
