"""What consuming gradients takes, and in which order they arrive."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graph_capture.costs.target import target_of
from graph_capture.loop.arrival_order import arranged, arrival_order
from graph_capture.loop.consumption import consumption, in_turn
from graph_capture.loop.optimizer_step import (
    OptimizerStep,
    ParameterStep,
    measure_optimizer,
    updating_only,
)


class _Several(torch.autograd.Function):
    """One node with a gradient for each leaf."""

    @staticmethod
    def forward(ctx, *leaves):  # type: ignore[no-untyped-def]
        ctx.num_leaves = len(leaves)
        return torch.zeros(1)

    @staticmethod
    def backward(ctx, _gradient):  # type: ignore[no-untyped-def]
        return tuple(torch.ones(1) for _ in range(ctx.num_leaves))


@pytest.mark.parametrize("num_leaves", [1, 2, 3, 7, 40])
def test_gradients_arrive_as_arranged(num_leaves: int) -> None:
    """A node whose gradients are arranged hands them on in the wanted order."""
    leaves = [torch.zeros(1, requires_grad=True) for _ in range(num_leaves)]
    found: list[int] = []
    for i, leaf in enumerate(leaves):
        leaf.register_post_accumulate_grad_hook(lambda _, i=i: found.append(i))
    wanted = list(reversed(range(num_leaves)))
    _Several.apply(*(leaves[i] for i in arranged(wanted, leads_on=False))).backward()
    assert found == wanted


def test_every_gradient_arrives_once() -> None:
    """The order is a permutation, with and without a node that follows."""
    for leads_on in (False, True):
        assert sorted(arrival_order(12, leads_on=leads_on)) == list(range(12))


def test_the_smallest_gradients_come_first() -> None:
    """Equal ones in the order of the step's gradients."""
    assert in_turn([(8, 0, "a"), (4, 2, "c"), (4, 1, "b")]) == ["b", "c", "a"]


def _optimizer(**workspaces: int) -> OptimizerStep:
    steps = {name: ParameterStep(workspace_bytes=size) for name, size in workspaces.items()}
    return OptimizerStep(
        name="Adam", state_bytes=0, workspace_bytes=max(workspaces.values()), for_parameter=steps
    )


def test_temporaries_lie_beside_the_gradients_that_are_left() -> None:
    """Of 4 + 8 bytes of gradients the first 4 are gone when the second takes its 16."""
    taken = consumption([("b", 4), ("w", 8)], _optimizer(b=8, w=16), in_order=True)
    assert taken.workspace_bytes == 16 - 4


def test_without_a_known_order_the_largest_temporaries_lie_beside_all() -> None:
    """Gradients of tensors of the call may arrive in between."""
    taken = consumption([("b", 4), ("w", 8)], _optimizer(b=8, w=16), in_order=False)
    assert taken.workspace_bytes == 16


def test_a_file_knows_only_the_largest_temporaries() -> None:
    """They are assumed for each parameter: never too little."""
    loaded = OptimizerStep(name="Adam", state_bytes=0, workspace_bytes=16)
    taken = consumption([("b", 4), ("w", 8)], loaded, in_order=True)
    assert taken.workspace_bytes == 16


def test_a_parameter_without_an_optimizer_takes_nothing() -> None:
    """Its gradient is only let go of."""
    assert consumption([("w", 8)], None, in_order=True).workspace_bytes == 0
    assert consumption([("w", 8)], _optimizer(b=8), in_order=True).workspace_bytes == 0


def test_an_adam_in_a_hook_takes_two_copies_of_its_parameter() -> None:
    """The root of the second moment, and that divided: not those of all parameters."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    step = measure_optimizer("adam", model, target_of(model, ()), in_hooks=True)
    assert step is not None
    assert step.for_parameter["0.weight"].workspace_bytes == 2 * 16 * 8 * 4
    assert step.for_parameter["1.weight"].workspace_bytes == 2 * 8 * 4 * 4
    assert step.workspace_bytes == 2 * 16 * 8 * 4


def test_an_optimizer_updates_the_one_parameter_alone() -> None:
    """Its groups are as before afterwards, and the others keep their values."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in zip(model, (1.0, 2.0))]
    optimizer = torch.optim.SGD(groups)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with updating_only(optimizer, model[1].weight):
        optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert changed == [False, False, True, False]
    assert torch.equal(model[1].weight, before[2] - 2)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
