"""Reading a joint graph: what is a view, what has an effect, what forward needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from graph_capture.errors import CaptureError
from graph_capture.private_torch.compiler import aot_autograd, dynamo_config, takes_boxed
from planner.compiled.joint_step import JointStep, is_view, makes_memory, read_joint_step
from planner.compiled.priced_step import price_step
from planner.compiled.sizes import plan_for_largest


def _joint(
    function: Any, *inputs: torch.Tensor, dynamic: bool | None = None, **options: Any
) -> tuple[GraphModule, int]:
    """The joint graph of a function's step, and how many results are forward's."""
    found: list[tuple[GraphModule, int]] = []

    class Found(Exception):
        pass

    def partition(module: GraphModule, _inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
        found.append((module, num_fwd_outputs))
        raise Found

    def never(module: GraphModule, _inputs: Any) -> Any:
        return takes_boxed(module)

    backend = aot_autograd(fw_compiler=never, bw_compiler=never, partition_fn=partition, **options)
    torch.compiler.reset()
    with pytest.raises(Exception):  # noqa: B017, PT011 - Dynamo wraps it in a class of its own
        torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    return found[0]


def joint_step_of(function: Any, *inputs: torch.Tensor, **options: Any) -> JointStep:
    return read_joint_step(*_joint(function, *inputs, **options))


def test_views_make_no_memory() -> None:
    """Transposing and reshaping are views; a product is not."""
    x = torch.randn(4, 6, requires_grad=True)
    step = joint_step_of(lambda x: (x.t().reshape(2, 12) * 2).sum(), x)
    nodes = {n.name: n for n in step.module.graph.nodes}
    assert is_view(nodes["permute"] if "permute" in nodes else nodes["t"])
    assert makes_memory(nodes["mul"])


def test_forward_needs_what_its_results_are_made_of() -> None:
    """The sum comes from the product; the gradient's calls come after them."""
    x = torch.randn(4, requires_grad=True)
    step = joint_step_of(lambda x: x.sin().sum(), x)
    names = [n.name for n in step.calls]
    assert names[: step.num_forward] == ["sin", "sum_1"]
    assert "cos" in names[step.num_forward :]


def test_checks_are_calls_of_forward_that_make_nothing() -> None:
    """Tracing notes no value for them; those of ``one_hot`` look at the classes."""
    x, classes = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    step = joint_step_of(lambda x, c: (x * F.one_hot(c, 3)).sum(), x, classes)
    checks = [n for n in step.calls[: step.num_forward] if "_assert" in str(n.target)]
    assert len(checks) == 2
    priced = price_step(step)
    made = [priced.graph.operators[priced.groups.index((n,))] for n in checks]
    assert all(operator.pinned and not operator.outputs for operator in made)


def test_sizes_that_depend_on_values_need_a_bound() -> None:
    """A mask picks so many rows: with a bound it is planned for the most, without it is refused."""

    def picked(x: torch.Tensor, most: int | None) -> torch.Tensor:
        rows = x[x.sum(-1) > 0]
        if most is not None:
            torch._check(rows.shape[0] <= most)
        return rows.sin().sum()

    x = torch.randn(8, 4, requires_grad=True)
    with dynamo_config().patch(capture_dynamic_output_shape_ops=True):
        bounded = joint_step_of(lambda x: picked(x, 50), x, dynamic=True)
        open_ended = joint_step_of(lambda x: picked(x, None), x, dynamic=True)
    plan_for_largest(bounded)
    sizes = {s.name: s.size_bytes for s in price_step(bounded).graph.storages}
    assert sizes["index"] == 50 * 4 * 4
    with pytest.raises(CaptureError, match=r"u0, depends on the values .* torch\._check"):
        price_step(open_ended)


def test_written_inputs_are_known() -> None:
    """An input that forward adds to is written once, by a copy at forward's end."""
    x, total = torch.randn(4, requires_grad=True), torch.zeros(4)

    def function(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        total.add_(x.detach())
        return x.sin().sum()

    step = joint_step_of(function, x, total)
    written = list(step.written.values())
    assert len(written) <= 1  # AOTAutograd may also hand the new value out
    assert len(step.outputs) + len(written) == 2


def test_functionalized_random_numbers_are_refused() -> None:
    """The setting changes the order of the graph's arguments; the error names it."""
    module, num_outputs = _joint(lambda x: x.sin().sum(), torch.randn(4, requires_grad=True))
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        module.graph.placeholder("fwd_seed_offset_1")
    with pytest.raises(CaptureError, match="functionalize_rng_ops"):
        read_joint_step(module, num_outputs)
