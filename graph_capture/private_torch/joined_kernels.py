"""The C++ kernels of a generated module are compiled together.

Each kernel of Inductor's is a program of its own, and most of what the C++ compiler spends on one
is headers and templates that all of them share. As one program they take it a fraction of the
time, under the same flags.

Imported when it is asked for, which takes seconds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from .replacing import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A kernel that is still to be compiled.

    Parameters
    ----------
    argtypes
        C++ types of its arguments.
    source
        Defines the function ``kernel``.
    alone
        Compiles it as PyTorch does.
    """

    argtypes: Sequence[str]
    source: str
    alone: Callable[[], Any]


@contextmanager
def compiling_together() -> Iterator[None]:
    """``AsyncCompile.cpp_pybinding`` leaves kernels to ``AsyncCompile.wait``; 2.11+.

    There they become one program for each of Inductor's compile threads. Kernels that can't be
    compiled together are compiled one by one.
    """
    from torch._inductor import async_compile

    place = Place(async_compile.AsyncCompile, "cpp_pybinding")
    compile_one, wait = place.value, async_compile.AsyncCompile.wait

    def later(compiler: Any, argtypes: Sequence[str], source: str) -> Any:
        def alone() -> Any:
            return compile_one(compiler, argtypes, source)

        return _Kernel(argtypes, source, alone) if _can_be_joined(source) else alone()

    def now(compiler: Any, scope: dict[str, Any]) -> None:
        kernels = {name: x for name, x in scope.items() if isinstance(x, _Kernel)}
        parts = _parts(kernels, async_compile.get_compile_threads())
        begun = [_begin(compiler, [kernels[name] for name in names]) for names in parts]
        for names, functions in zip(parts, begun, strict=True):
            scope.update(zip(names, functions(), strict=True))
        wait(compiler, scope)

    with ExitStack() as stack:
        stack.enter_context(place.holding(later))
        stack.enter_context(Place(async_compile.AsyncCompile, "wait").holding(now))
        yield


_DEFINITION = re.compile(r"\bkernel\s*\(")
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include\b.*$", re.MULTILINE)


def _can_be_joined(source: str) -> bool:
    """Whether ``kernel`` is the name of its function and of nothing else that is called."""
    return len(_DEFINITION.findall(source)) == 1


def _parts(kernels: dict[str, _Kernel], most: int) -> list[list[str]]:
    """Split kernels into parts with about equally much code."""
    parts: list[list[str]] = [[] for _ in range(min(max(1, most), len(kernels)))]
    lengths = [0] * len(parts)
    for name in sorted(kernels, key=lambda name: -len(kernels[name].source)):
        at = lengths.index(min(lengths))
        parts[at].append(name)
        lengths[at] += len(kernels[name].source)
    return parts


def _begin(compiler: Any, kernels: Sequence[_Kernel]) -> Callable[[], list[Any]]:
    """Begin to compile kernels; the result waits for what PyTorch would have for each."""
    from torch._inductor.async_compile import get_compile_threads
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.exc import CppCompileError

    if len(kernels) == 1:
        return lambda: [kernels[0].alone()]

    class Joined(CppPythonBindingsCodeCache):
        """Its function returns the kernel of a number."""

        extra_parse_arg = _called_by_python(kernels).replace("{", "{{").replace("}", "}}")
        call_entry_function = "return PyCFunction_New(&methods[{}], nullptr);"

    submit = compiler.submit if get_compile_threads() > 1 else None
    library = Joined.load_pybinding_async(["int64_t"], _program(kernels), submit_fn=submit)

    def functions() -> list[Any]:
        try:
            kernel_of = library()
        except CppCompileError:
            logger.debug("%d kernels are compiled one by one", len(kernels), exc_info=True)
            return [kernel.alone() for kernel in kernels]
        return [kernel_of(i) for i in range(len(kernels))]

    return functions


def _program(kernels: Sequence[_Kernel]) -> str:
    """Kernels one after the other, each under a name and with definitions of its own."""
    includes = dict.fromkeys(line for kernel in kernels for line in _INCLUDE.findall(kernel.source))
    parts = [*includes]
    for i, kernel in enumerate(kernels):
        body = _INCLUDE.sub("", kernel.source)
        parts.append(f"#define kernel kernel_{i}\nnamespace joined_{i} {{\n{body}\n}}")
        parts.append(f"#undef kernel\nusing joined_{i}::kernel_{i};")
    return "\n".join(parts)


_CALLED_BY_PYTHON = """
static PyObject* kernel_{i}_py(PyObject* self, PyObject* args) {{
    try {{
        if(!PyTuple_CheckExact(args) || PyTuple_GET_SIZE(args) != {num})
            throw std::runtime_error("a tuple of {num} args required");
        kernel_{i}({args});
        Py_RETURN_NONE;
    }} catch(std::exception const& e) {{
        PyErr_SetString(PyExc_RuntimeError, e.what());
    }} catch(...) {{
        PyErr_SetString(PyExc_RuntimeError, "unhandled error");
    }}
    return nullptr;
}}
"""


def _called_by_python(kernels: Sequence[_Kernel]) -> str:
    """Bindings as PyTorch makes them for one kernel (``parse_arg`` is its own), and their table."""
    bindings, methods = [], []
    for i, kernel in enumerate(kernels):
        types = [argtype.replace("const ", "") for argtype in kernel.argtypes]
        args = ", ".join(f"parse_arg<{argtype}>(args, {n})" for n, argtype in enumerate(types))
        bindings.append(_CALLED_BY_PYTHON.format(i=i, num=len(types), args=args))
        methods.append(f'{{"kernel_{i}", kernel_{i}_py, METH_VARARGS, ""}}')
    return "".join([*bindings, f"static PyMethodDef methods[] = {{{', '.join(methods)}}};\n"])


__all__ = ["compiling_together"]
