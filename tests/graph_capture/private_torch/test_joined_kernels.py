"""Kernels of a module are compiled as one program, and work as those that are not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graph_capture.private_torch.compiler import inductor_config
from graph_capture.private_torch.joined_kernels import compiling_together

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(
        not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))),
        reason="Inductor needs a C++ compiler",
    ),
]

TYPES = ["const float*", "float*", "const int64_t"]

KERNEL = """
#include <cmath>
{before}
static float one(float x) {{ return {value}; }}
extern "C" void kernel(const float* given, float* made, const int64_t num)
{{
    for (int64_t i = 0; i < num; i++) made[i] = one(given[i]);
}}
"""
"""Each has a function of the same name, which may not be taken for another kernel's."""


def kernel(value: str, before: str = "") -> str:
    return KERNEL.format(value=value, before=before)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Programs that are given to the C++ compiler, whose cache is empty."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found: list[str] = []
    load = CppPythonBindingsCodeCache.load_async.__func__

    def counted(cls: Any, program: str, *args: Any, **named: Any) -> Any:
        found.append(program)
        return load(cls, program, *args, **named)

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_async", classmethod(counted))
    with inductor_config().patch(cpp_cache_precompile_headers=False):
        yield found


def compiled(sources: list[str], *, threads: int = 1) -> list[Any]:
    """What a module has for kernels once it is loaded."""
    from torch._inductor.async_compile import AsyncCompile

    with inductor_config().patch(compile_threads=threads), compiling_together():
        compiler = AsyncCompile()
        module = {f"k{i}": compiler.cpp_pybinding(TYPES, s) for i, s in enumerate(sources)}
        module["other"] = other = object()
        compiler.wait(module)
    assert module.pop("other") is other
    return list(module.values())


def called(function: Any) -> torch.Tensor:
    made = torch.empty(5)
    function(torch.arange(5.0), made, 5)
    return made


@pytest.mark.parametrize(("threads", "num_programs"), [(1, 1), (2, 2)])
def test_a_program_for_each_thread(programs: list[str], threads: int, num_programs: int) -> None:
    """Each kernel computes its own numbers."""
    functions = compiled([kernel(f"x + {i}") for i in range(3)], threads=threads)
    assert len(programs) == num_programs
    for i, function in enumerate(functions):
        torch.testing.assert_close(called(function), torch.arange(5.0) + i, rtol=0, atol=0)


def test_arguments_are_checked(programs: list[str]) -> None:
    """A wrong number of them, or one of another type, is an error as it is for one kernel."""
    function, _ = compiled([kernel("x"), kernel("2 * x")])
    with pytest.raises(RuntimeError, match="3 args required"):
        function(torch.ones(5))
    with pytest.raises(RuntimeError, match="expected int"):
        function(torch.ones(5), torch.ones(5), "five")


def test_what_does_not_go_together_is_compiled_apart(programs: list[str]) -> None:
    """Two kernels with another global function of one name, which one program may not have."""
    before = 'extern "C" int global() {{ return {}; }}'
    functions = compiled([kernel("x + global()", before.format(i)) for i in range(2)])
    assert len(programs) == 3
    assert [called(f).tolist() for f in functions] == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]


def test_a_kernel_that_names_its_function_twice_is_alone(programs: list[str]) -> None:
    """It is not renamed."""
    declared = 'extern "C" void kernel(const float*, float*, const int64_t);'
    functions = compiled([kernel("x + 1", declared), kernel("x + 2"), kernel("x + 3")])
    assert len(programs) == 2
    assert [called(f)[0].item() for f in functions] == [1, 2, 3]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_compilers_error_is_inductors(programs: list[str], threads: int) -> None:
    """Of a kernel that cannot be compiled at all."""
    from torch._inductor.exc import CppCompileError

    with pytest.raises(CppCompileError, match="nowhere"):
        compiled([kernel("x"), kernel("nowhere(x)"), kernel("x + 1")], threads=threads)
