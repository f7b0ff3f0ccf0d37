"""One training step, defined once: what it differentiates, and the order of its parts.

The planner, the measuring tool and the tests all mean this step:

1. the model runs on the sample, then ``loss_fn`` when there is one, under
   whatever autocast is on;
2. the backward pass runs from what :func:`differentiate` names, with autocast off and its cache of
   casts emptied, as in a training loop that closes ``with torch.autocast(...)`` before
   it calls ``backward()``;
3. the optimizer steps, when there is one;
4. the caller holds outputs and loss until the step has ended, and there are no gradients
   when it begins; or what :class:`graph_capture.loop.loop_holds.LoopHolds` says instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graph_capture.loop.loop_holds import NOTHING_ELSE, LoopHolds
from graph_capture.loop.optimizer_step import OPTIMIZERS
from graph_capture.private_torch.trees import tree_leaves, tree_map
from graph_capture.recording.outputs import loss_of
from graph_capture.suggestions import did_you_mean

from .consuming import consuming, stepping

LossFn = Callable[[Any], Tensor]
Sample = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Differentiated:
    """What the backward pass of a step starts from.

    Parameters
    ----------
    tensors
        The roots of the backward pass, each once. Each gets a gradient of ones.
    loss
        The one root when it is a loss; ``None`` when every output that requires
        grad is differentiated.
    """

    tensors: tuple[Tensor, ...]
    loss: Tensor | None


def differentiate(output: Any, loss_fn: LossFn | None = None) -> Differentiated:
    """Return what a step differentiates: a loss where there is one, else every output.

    In this order: ``loss_fn(output)``; the output itself when it is a tensor of
    one element; ``output.loss``; every tensor of the output that requires grad.

    A plain dict with a ``"loss"`` key falls under the last rule. Only an attribute
    named ``loss`` is taken for the loss by default, since the other outputs then come
    back detached from a planned module. Pass ``loss_fn=lambda output: output["loss"]``
    to differentiate the entry.

    Parameters
    ----------
    output
        What the model returned.
    loss_fn
        Computes the scalar loss from it, as the training loop does.

    Raises
    ------
    TypeError
        When the loss is not a tensor.
    ValueError
        When the loss has more than one element or does not require grad, or
        when no output requires grad.
    """
    if loss_fn is not None:
        return _of_loss(loss_fn(output), "loss_fn(output)")
    if isinstance(output, Tensor) and output.numel() == 1:
        return _of_loss(output, "the model's output")
    loss = loss_of(output)
    if loss is not None:
        return _of_loss(loss, "output.loss")
    unique = {id(t): t for t in output_tensors(output) if t.requires_grad}
    if not unique:
        raise ValueError(
            f"no output of the model requires grad (it returned a {type(output).__name__}); "
            "a step needs at least one trainable parameter that the output depends on"
        )
    return Differentiated(tensors=tuple(unique.values()), loss=None)


def output_tensors(output: Any) -> tuple[Tensor, ...]:
    """Return every tensor of a nested output, in order.

    Descends into tuples, lists, dicts, Transformers' outputs and whatever else is
    registered with ``torch.utils._pytree``, but not into other objects.
    """
    return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def call_model(model: Callable[..., Any], sample_input: Sample) -> Any:
    """Call the model on a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(sample_input, Tensor):
        return model(sample_input)
    if isinstance(sample_input, Mapping):
        return model(**sample_input)
    if isinstance(sample_input, (tuple, list)):
        return model(*sample_input)
    raise TypeError(
        "sample_input must be a tensor, a tuple of positional arguments or a dict of keyword "
        f"arguments; got a {type(sample_input).__name__}"
    )


def train_step(
    model: Callable[..., Any],
    sample_input: Sample,
    loss_fn: LossFn | None = None,
    *,
    releases_outputs: bool = False,
    num_calls: int = 1,
    copies_outputs: bool = False,
) -> tuple[Any, Tensor | None]:
    """Run forward, loss and backward once; gradients accumulate as ``backward()`` does.

    Parameters
    ----------
    model
        A module or any callable.
    sample_input
        A tensor, a tuple of positional arguments or a dict of keyword arguments.
    loss_fn
        Computes the scalar loss from the model's output.
    releases_outputs
        Whether the outputs are let go of once there is a loss.
    num_calls
        How often the model is called, on the sample and on copies of it, before one
        backward pass from the losses of all.
    copies_outputs
        Whether the loop gets copies, as from a ``DistributedDataParallel`` that looks for
        unused parameters.

    Returns
    -------
    tuple
        The outputs, and the loss or ``None``; see :func:`differentiate`. ``None`` for
        outputs that were let go of. Of several calls a list of outputs and losses, and the
        first loss.
    """
    if num_calls > 1:
        return _several_calls(
            model, sample_input, loss_fn, releases_outputs=releases_outputs, num_calls=num_calls
        )
    output = call_model(model, sample_input)
    if copies_outputs:
        output = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output)
    target = differentiate(output, loss_fn)
    if releases_outputs and target.loss is not None:
        output = None
    with outside_autocast():
        torch.autograd.backward(target.tensors, [torch.ones_like(t) for t in target.tensors])
    return output, target.loss


def _several_calls(
    model: Callable[..., Any],
    sample_input: Sample,
    loss_fn: LossFn | None,
    *,
    releases_outputs: bool,
    num_calls: int,
) -> tuple[Any, Tensor | None]:
    held: list[Any] = [_copied(sample_input) for _ in range(num_calls - 1)]
    samples, targets = [sample_input, *held], []
    for sample in samples:
        output = call_model(model, sample)
        targets.append(differentiate(output, loss_fn))
        if not releases_outputs or targets[-1].loss is None:
            held.append(output)
        del output
    roots = [t for target in targets for t in target.tensors]
    with outside_autocast():
        torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
    held += [target.loss for target in targets]
    return held, targets[0].loss


def _copied(sample_input: Sample) -> Any:
    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    return tree_map(copy, sample_input)


def make_step(
    model: Callable[..., Any],
    sample_input: Sample,
    *,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int | None = None,
    holds: LoopHolds = NOTHING_ELSE,
) -> Callable[[], tuple[Any, Tensor | None]]:
    """Bind a step to its arguments, for timing.

    Parameters
    ----------
    model, sample_input, loss_fn
        As :func:`train_step` takes them.
    optimizer
        Steps after each backward pass, or in hooks where the loop consumes gradients;
        ``None`` leaves the parameters unchanged.
    seed
        Given to ``torch.manual_seed`` before each call; ``None`` seeds nothing.
    holds
        What the loop holds; ``resident_bytes`` is the caller's business. One process stands
        for ``DistributedDataParallel``: gradients of earlier steps for buckets that gradients
        are parts of; buckets beside gradients are the caller's business, too.

    Returns
    -------
    Callable
        Clears the gradients, then runs one step and returns its outputs and loss. Where
        gradients are accumulated it sets those of the model to zero, so that they stay.
    """

    def step() -> tuple[Any, Tensor | None]:
        clear_gradients(model, sample_input, loss_fn, set_to_none=not holds.keeps_gradients)
        if seed is not None:
            torch.manual_seed(seed)
        hooks = consuming(model, stepping(optimizer)) if holds.consumes else nullcontext()
        with hooks:
            output, loss = train_step(
                model,
                sample_input,
                loss_fn,
                releases_outputs=holds.releases,
                copies_outputs=holds.copies_outputs,
                num_calls=holds.concurrent_calls,
            )
        if optimizer is not None and not holds.consumes:
            optimizer.step()
        return output, loss

    return step


def clear_gradients(
    model: Callable[..., Any],
    sample_input: Sample = (),
    loss_fn: LossFn | None = None,
    *,
    set_to_none: bool = True,
) -> None:
    """Set every gradient that a step leaves to ``None``, for modules and inputs that require
    grad; those of modules to zero where ``set_to_none`` is false."""
    for part in (model, loss_fn):
        if isinstance(part, nn.Module):
            part.zero_grad(set_to_none=set_to_none)
    for t in output_tensors(sample_input):
        if t.requires_grad and t.is_leaf:
            t.grad = None


def build_optimizer(name: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build an optimizer by name, with PyTorch's defaults.

    Raises
    ------
    ValueError
        When the name is not one of :data:`OPTIMIZERS`.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> type(build_optimizer("AdamW", layer.parameters())).__name__
    'AdamW'
    """
    try:
        build = OPTIMIZERS[name.lower()]
    except KeyError:
        known, meant = ", ".join(OPTIMIZERS), did_you_mean(name.lower(), OPTIMIZERS)
        raise ValueError(f"unknown optimizer {name!r}; {meant}known by name: {known}") from None
    return build([p for p in parameters if p.requires_grad])


def _of_loss(loss: Any, what: str) -> Differentiated:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{what} must be a scalar tensor; got a {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{what} must be a scalar; got a tensor of shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(f"{what} does not require grad, so there is nothing to differentiate")
    return Differentiated(tensors=(loss,), loss=loss)


@contextmanager
def outside_autocast() -> Iterator[None]:
    """Exit every active autocast, as the end of its ``with`` block would."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                torch.clear_autocast_cache()
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
