"""What Inductor makes of a graph; imported when it is asked for, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .compiler import functorch_config, inductor_config
from .inductor_codes import generating_once
from .inductor_fusion import fusing_as_told
from .joined_kernels import compiling_together
from .replacing import Place


@dataclass(frozen=True, slots=True)
class GeneratedCode:
    """The Python code that Inductor generates for a graph, without its compiled kernels.

    Parameters
    ----------
    text
        A module with a function ``call`` of one list of arguments, which it empties.
    constants
        What the module finds under these names.
    """

    text: str
    constants: Mapping[str, Any]


class _Generated(Exception):
    """The code is there; compiling it is not wanted."""


# 2.11+; what is written before kernels are compiled
def generate_code(
    module: Any,
    inputs: Sequence[Any],
    *,
    is_backward: bool,
    num_visible: int,
    donated: Sequence[int] = (),
) -> GeneratedCode:
    """``compile_fx_inner`` up to ``GraphLowering.codegen``; the module is used up; 2.11+.

    Parameters
    ----------
    num_visible
        How many of the first results the caller sees; these keep their strides.
    donated
        Inputs whose memory the code may reuse.
    """
    from torch._inductor import compile_fx, graph, utils

    found: list[GeneratedCode] = []

    def stop(lowering: Any) -> Any:
        code, _ = lowering.codegen()
        found.append(GeneratedCode(code.value, dict(lowering.constants)))
        raise _Generated

    (output,) = module.graph.find_nodes(op="output")
    output.meta["user_visible_output_idxs"] = list(range(num_visible))
    num_static = utils.count_tangents(module) if is_backward else len(inputs)
    with ExitStack() as stack:
        stack.enter_context(fusing_as_told())
        stack.enter_context(Place(graph.GraphLowering, "compile_to_module").holding(stop))
        stack.enter_context(Place(graph, "get_donated_idxs").holding(lambda: list(donated)))
        stack.enter_context(
            inductor_config().patch(fx_graph_cache=False, fx_graph_remote_cache=False)
        )
        try:
            compile_fx.compile_fx_inner(
                module,
                inputs,
                static_input_idxs=list(range(num_static)),
                is_backward=is_backward,
            )
        except Exception:  # Inductor raises an error of its own around ours
            if not found:
                raise
    return found[0] if found else _passing_on(module)


def _passing_on(module: Any) -> GeneratedCode:
    """Code for a graph without calls, for which Inductor generates none: some inputs, returned."""
    (output,) = module.graph.find_nodes(op="output")
    given = {
        node: f"given[{i}]" for i, node in enumerate(module.graph.find_nodes(op="placeholder"))
    }
    results = ", ".join(given.get(x, repr(x)) for x in output.args[0])
    body = f"    results = [{results}]\n    given.clear()\n    return results\n"
    return GeneratedCode(f"def call(given):\n{body}", {})


# 2.11+; writes as results, operators as Inductor wants them
def functional_graph(
    function: Callable[..., list[torch.Tensor]], inputs: Sequence[torch.Tensor]
) -> Any:
    """``make_fx`` of ``functionalize``, with Inductor's decompositions; 2.11+.

    What is written to inputs is there as ``copy_`` at the end. Inputs are fake tensors.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(functionalize(function), decomposition_table=select_decomp_table())
    with torch.no_grad():
        return traced(*inputs)


@contextmanager
def kernels_do_nothing() -> Iterator[None]:
    """While active, generated code gets kernels that return at once (``AsyncCompile``); 2.11+."""
    from torch._inductor.async_compile import AsyncCompile

    def made(*_args: Any, **_kwargs: Any) -> Callable[..., None]:
        return lambda *_given, **_named: None

    with ExitStack() as stack:
        for name in ("cpp_pybinding", "cpp"):
            stack.enter_context(Place(AsyncCompile, name).holding(made))
        yield


@contextmanager
def partitioning_by(partitioner: Any) -> Iterator[None]:
    """While active, Inductor partitions by ``custom_partitioner_fn``; 2.11+.

    AOTAutograd's cache is off, as nobody is asked on its hits. Backward is compiled at once, under
    the same rules of fusion as forward, and not when it is first run. Code that the partitioner
    let Inductor generate is compiled as it is, its kernels together.
    """
    settings = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with ExitStack() as stack:
        stack.enter_context(generating_once())
        stack.enter_context(compiling_together())
        stack.enter_context(inductor_config().patch(custom_partitioner_fn=partitioner))
        stack.enter_context(functorch_config().patch(settings))
        stack.enter_context(fusing_as_told())
        yield


@contextmanager
def compiling_by(compile_graph: Callable[..., Any]) -> Iterator[None]:
    """While active, ``torch.compile`` asks a function of ours where it asks ``compile_fx``; 2.11+.

    Parameters
    ----------
    compile_graph
        Gets what ``compile_fx`` gets, after ``compile_fx`` itself.
    """
    from torch._inductor import compile_fx

    place = Place(compile_fx, "compile_fx")
    theirs = place.value

    def ours(*args: Any, **kwargs: Any) -> Any:
        with place.holding(theirs):  # which calls itself by name
            return compile_graph(theirs, *args, **kwargs)

    with place.holding(ours):
        yield


def compile_by_inductor(module: Any, inputs: Sequence[Any]) -> Any:
    """``torch._inductor.compile_fx.compile_fx``: all of Inductor, for Dynamo's graph; 2.11+."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(module, inputs)


def custom_partitioner(partition: Callable[..., Any], name: str) -> Any:
    """A ``CustomPartitionerFn`` whose ``uuid`` is a name, for Inductor's caches; 2.11+."""
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Custom(CustomPartitionerFn):
        def __call__(self, gm: Any, joint_inputs: Any, **kwargs: Any) -> Any:
            return partition(gm, joint_inputs, **kwargs)

        def uuid(self) -> str:
            return name

        def __reduce__(self) -> Any:  # for the key of a cache, which writes down all settings
            return str, (name,)

    return Custom()


__all__ = [
    "GeneratedCode",
    "compile_by_inductor",
    "compiling_by",
    "custom_partitioner",
    "functional_graph",
    "generate_code",
    "kernels_do_nothing",
    "partitioning_by",
]
