"""Calls of what ``torch.compile`` returned, and when Dynamo compiles in them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from .replacing import Place

_MakeContext = Callable[[], AbstractContextManager[Any]]


def enter_calls(backend: Any, make: Callable[[], _MakeContext]) -> None:
    """Have a context entered around each call that is compiled with a backend; 2.11+.

    Dynamo takes it from the attribute ``backend_ctx_ctor`` of what it compiles with, which is
    a copy of ``torch._TorchCompileWrapper`` with all its attributes. It loads no compiler.

    Parameters
    ----------
    make
        Is called for each ``torch.compile`` and returns what makes the context of a call.
    """
    wrapper: Any = torch._TorchCompileWrapper
    wrapper.compiler_fn = _Beside(backend, make)


class _Beside:
    """``_TorchCompileWrapper.compiler_fn``; where it is a given one, a context is put beside it."""

    def __init__(self, backend: Any, make: Callable[[], _MakeContext]) -> None:
        self._backend, self._make = backend, make

    def __get__(self, wrapper: Any, owner: Any = None) -> Any:
        return self if wrapper is None else vars(wrapper)["compiler_fn"]

    def __set__(self, wrapper: Any, compiler_fn: Any) -> None:
        vars(wrapper)["compiler_fn"] = compiler_fn
        if compiler_fn is self._backend:
            vars(wrapper)["backend_ctx_ctor"] = self._make()


@contextmanager
def entering_calls(backend_name: str, make_context: _MakeContext) -> Iterator[None]:
    """While active, a context is entered around each call compiled with a backend; 2.11+.

    Also around calls of what was compiled before (``OptimizeContext.enter_exit_hooks``).
    """
    from torch._dynamo.eval_frame import OptimizeContext

    with Place(OptimizeContext, "enter_exit_hooks").holding(_AndOurs(backend_name, make_context)):
        yield


class _AndOurs:
    """``enter_exit_hooks``, which Dynamo runs before a call and whose results it runs after it."""

    def __init__(self, backend_name: str, make_context: _MakeContext) -> None:
        self._backend_name, self._make_context = backend_name, make_context

    def __get__(self, context: Any, owner: Any = None) -> Any:
        from torch._dynamo.eval_frame import innermost_backend

        if context is None:
            return self
        own = vars(context)["enter_exit_hooks"]
        backend = innermost_backend(context.callback)
        if getattr(backend, "compiler_name", None) != self._backend_name:
            return own
        return _Hooks(own, self._enter)

    def __set__(self, context: Any, hooks: Any) -> None:
        vars(context)["enter_exit_hooks"] = hooks

    def _enter(self) -> Callable[[], Any]:
        context = self._make_context()
        context.__enter__()
        return lambda: context.__exit__(None, None, None)


class _Hooks(list[Any]):
    """A context's own hooks and one of ours; what is appended is its own."""

    def __init__(self, own: list[Any], ours: Any) -> None:
        super().__init__([*own, ours])
        self._own = own

    def append(self, hook: Any) -> None:
        self._own.append(hook)


@contextmanager
def hearing_of_compiles(begins: Callable[[], None], ends: Callable[[], None]) -> Iterator[None]:
    """While active, be told when Dynamo begins and ends to compile (``callback_handler``); 2.11+.

    Of this thread's compilations alone.
    ``torch.compiler.reset()`` makes it forget whom to tell.
    """
    from torch._dynamo.callback import callback_handler

    thread = threading.get_ident()

    def begin(_args: Any) -> None:
        if threading.get_ident() == thread:
            begins()

    def end(_args: Any) -> None:
        if threading.get_ident() == thread:
            ends()

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        for callbacks, told in (
            (callback_handler.start_callbacks, begin),
            (callback_handler.end_callbacks, end),
        ):
            if told in callbacks:
                callbacks.remove(told)


__all__ = ["enter_calls", "entering_calls", "hearing_of_compiles"]
