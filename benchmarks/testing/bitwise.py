"""Training with and without a plan, compared bit by bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only

from planner.base.training_step import (
    LossFn,
    train_step,
)


def assert_same_training(
    make_model: Callable[[], nn.Module],
    planned_apply: Callable[[nn.Module], nn.Module],
    sample: Callable[[int], Any],
    *,
    loss_fn: LossFn | None = None,
    steps: int = 3,
    seed: int = 0,
    lr: float = 0.05,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> nn.Module:
    """Train two copies, one of them planned, and compare every bit after every step.

    This compares the structure of the output and each tensor in it, the loss, the inputs
    and their gradients, every parameter's gradient (and whether there is one), the
    parameters after an SGD update, every buffer, and the state of the random generators.
    A difference is reported with the first tensor that shows it and its largest
    absolute error.

    Parameters
    ----------
    make_model
        Builds the model; is called twice, each time with the same seed.
    planned_apply
        Applies a plan to the given model, and returns the model.
    sample
        Maps a seed to an input; each step has its own.
    loss_fn
        As for :func:`planner.base.training_step.train_step`.
    steps
        Number of steps, with an SGD update after each.
    seed
        Of the models; step ``i`` is seeded with ``seed + 1 + i``.
    lr
        Learning rate of the updates.
    context
        Surrounds each step, e.g. the ``context`` of a zoo's case.

    Returns
    -------
    nn.Module
        The planned copy, trained: to be measured without being captured again.
    """
    plain = _seeded(make_model, seed)
    planned = planned_apply(_seeded(make_model, seed))
    assert_same_tensors(dict(_state(plain)), dict(_state(planned)), "before the first step")
    for i in range(steps):
        when = f"in step {i + 1} of {steps}"
        expected = _one_step(plain, sample(seed + 1 + i), loss_fn, seed + 1 + i, lr, context)
        actual = _one_step(planned, sample(seed + 1 + i), loss_fn, seed + 1 + i, lr, context)
        assert_same_tensors(expected, actual, when)
    return planned


def assert_same_tensors(expected: dict[str, Any], actual: dict[str, Any], when: str = "") -> None:
    """Compare named values; tensors by their bits, including NaN and the sign of zero."""
    assert list(expected) == list(actual), (
        f"{when}: not the same things came out: only without the plan "
        f"{sorted(set(expected) - set(actual))}, only with it {sorted(set(actual) - set(expected))}"
    )
    for name, a in expected.items():
        b = actual[name]
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            same = type(a) is type(b) and bool(a == b)
            assert same, f"{when}: {name} is {_brief(a)} without the plan, {_brief(b)} with it"
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape), (
            f"{when}: {name} is {_brief(a)} without the plan, {_brief(b)} with it"
        )
        assert same_bits(a, b), f"{when}: {name} differs, {_difference(a, b)}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits."""
    return torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def _seeded(make_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make_model()


def _one_step(
    model: nn.Module,
    sample_input: Any,
    loss_fn: LossFn | None,
    seed: int,
    lr: float,
    context: Callable[[], contextlib.AbstractContextManager[Any]],
) -> dict[str, Any]:
    """One step and an SGD update, as a flat list of everything that can be compared."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with context():
        output, loss = train_step(model, sample_input, loss_fn)
    seen: dict[str, Any] = {"type of the output": type(output), "loss": loss}
    seen |= _named(output, "output")
    seen |= _named(sample_input, "input")
    for name, value in _named(sample_input, "input").items():
        if isinstance(value, Tensor) and value.requires_grad:
            seen[f"gradient of {name}"] = value.grad
    for name, p in model.named_parameters(remove_duplicate=False):
        seen[f"gradient of {name}"] = p.grad
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.add_(p.grad, alpha=-lr)
    seen |= dict(_state(model))
    seen["state of the CPU generator"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        seen["state of the CUDA generator"] = torch.cuda.get_rng_state()
    return tree_map_only(Tensor, lambda t: t.detach().clone(), seen)


def _state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, p in model.named_parameters(remove_duplicate=False):
        yield f"parameter {name}", p
    for name, b in model.named_buffers(remove_duplicate=False):
        yield f"buffer {name}", b


def _named(tree: Any, prefix: str) -> dict[str, Any]:
    try:
        leaves, _ = tree_flatten_with_path(tree)
    except ValueError:  # diffusers' outputs are registered without the names of their parts
        leaves = [((f"[{i}]",), leaf) for i, leaf in enumerate(tree_leaves(tree))]
    named = {}
    for path, leaf in leaves:
        plain = leaf is None or isinstance(leaf, (Tensor, bool, int, float, str))
        named[prefix + "".join(map(str, path))] = leaf if plain else type(leaf)
    return named


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return repr(value)


def _difference(a: Tensor, b: Tensor) -> str:
    differing = int((_bits(a).view(a.dtype) != _bits(b).view(b.dtype)).sum())
    if a.dtype == torch.bool or not (a.is_floating_point() or a.is_complex()):
        return f"{differing} of {a.numel()} values"
    error = (a.double() - b.double()).abs().max().item() if not a.is_complex() else float("nan")
    size = a.double().abs().max().item() if not a.is_complex() else float("nan")
    return (
        f"{differing} of {a.numel()} values, largest absolute error {error:.3e} "
        f"(largest value {size:.3e})"
    )
