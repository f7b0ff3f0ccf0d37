"""Measure an optimizer's state and the cost of its step, without running it for real."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .absent_cuda import ensure_cuda_guard
from .capture_lock import holds_capture_lock
from .costs.allocator import block_bytes
from .fake_call_cache import FakeCallCache
from .fake_inputs import FakeInputs
from .memory_meter import MemoryMeter
from .private_torch.aten import local_scalar_dense
from .private_torch.dispatch import TorchDispatchMode
from .private_torch.fake_tensors import FakeTensor, FakeTensorMode
from .private_torch.modules import FOREACH_TYPES
from .recorder import storage_id
from .suggestions import did_you_mean
from .target import Target

OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "sgd_momentum": partial(torch.optim.SGD, momentum=0.9),
}


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """Memory of an optimizer.

    Parameters
    ----------
    name
        Class of the optimizer.
    state_bytes
        Bytes that it keeps between steps.
    workspace_bytes
        Bytes that its step takes beside parameters, gradients and state.
    calls
        The calls that the step dispatches, for costing.
    step_ns
        Nanoseconds of the step if its calls are no longer known, as in a plan from a
        file; ``None`` if it was not priced.
    """

    name: str
    state_bytes: int
    workspace_bytes: int
    calls: tuple[tuple[Any, tuple, dict, Any], ...] = ()
    step_ns: int | None = None


@holds_capture_lock
def measure_optimizer(
    optimizer: torch.optim.Optimizer | str | None, model: nn.Module, target: Target
) -> OptimizerStep | None:
    """Measure state and workspace of ``optimizer`` on the parameters of ``model``.

    A twin of the optimizer takes two steps on stand-ins of its parameters, so this
    works for any optimizer that allocates what it needs in ``step``. On CUDA,
    PyTorch's optimizers update all parameters at once by default (``foreach``), with
    temporaries as large as all of them together.

    Parameters
    ----------
    target
        Where the step runs.

    Raises
    ------
    ValueError
        When the name is unknown or the optimizer cannot step without a closure.
    """
    if optimizer is None:
        return None
    if not isinstance(optimizer, str):
        optimizer = _innermost(optimizer)
    if target.absent:
        ensure_cuda_guard()
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode, _NumbersOfFakeTensors(FakeCallCache(fake_mode)), _fake_tensors_are_parameters():
        twin, name = _twin(optimizer, model, FakeInputs(fake_mode, target))
        parameters = [p for group in twin.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = torch.empty_like(p)
        try:
            twin.step()
        except Exception as error:  # a foreign optimizer may raise anything on stand-ins
            raise ValueError(
                f"{name} cannot take a step on stand-ins of the parameters ({error}); "
                "pass optimizer=None and leave room for its state in the budget"
            ) from error
        own = {storage_id(t) for p in parameters for t in (p, p.grad)}
        state = {
            storage_id(t): block_bytes(t.untyped_storage().nbytes(), target.torch_type)
            for t in _tensors(twin.state)
            if storage_id(t) not in own and t.device.type == target.torch_type
        }
        known = own | {storage_id(t) for t in _tensors(twin.state)}
        meter = MemoryMeter(known=known.__contains__)
        with meter:
            twin.step()
    return OptimizerStep(
        name=name,
        state_bytes=sum(state.values()),
        workspace_bytes=meter.peak_bytes,
        calls=tuple(meter.calls),
    )


class _NumbersOfFakeTensors(TorchDispatchMode):
    """``.item()`` of a stand-in returns 0.5: memory depends on shapes, not on values.

    Adafactor, for example, reads the norm of each parameter; NAdam divides by one
    minus a product that it keeps.
    """

    def __init__(self, repeated: FakeCallCache) -> None:
        super().__init__()
        self._repeated = repeated

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return True if dtype == torch.bool else 0.5 if dtype.is_floating_point else 1
        return self._repeated.run(func, args, kwargs or {})


@contextmanager
def _fake_tensors_are_parameters() -> Iterator[None]:
    """While active, optimizers choose between their implementations as for real parameters."""
    FOREACH_TYPES.append(FakeTensor)
    try:
        yield
    finally:
        FOREACH_TYPES.remove(FakeTensor)


def _innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside a wrapper such as accelerate's, which is none of its own.

    A wrapper was never initialized as an optimizer, and a twin of it would be: PyTorch
    then patches the wrapper's class.
    """
    while "_optimizer_step_pre_hooks" not in vars(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            break
        optimizer = inner
    return optimizer


def _twin(
    optimizer: torch.optim.Optimizer | str, model: nn.Module, twins: FakeInputs
) -> tuple[torch.optim.Optimizer, str]:
    def stand_in(p: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(twins.of(p.detach()), requires_grad=p.requires_grad)

    if isinstance(optimizer, str):
        make = OPTIMIZERS.get(optimizer.lower())
        if make is None:
            meant = did_you_mean(optimizer.lower(), OPTIMIZERS)
            raise ValueError(
                f"unknown optimizer {optimizer!r}; {meant}one of {', '.join(OPTIMIZERS)}"
            )
        twin = make([stand_in(p) for p in model.parameters() if p.requires_grad])
        return twin, type(twin).__name__
    groups = [
        {**group, "params": [stand_in(p) for p in group["params"] if p.requires_grad]}
        for group in optimizer.param_groups
    ]
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(
        {k: v for k, v in optimizer.__dict__.items() if k not in ("state", "param_groups")}
    )
    twin.__dict__["step"] = type(optimizer).step.__get__(twin)
    torch.optim.Optimizer.__init__(
        twin, [g for g in groups if g["params"]], dict(optimizer.defaults)
    )
    return twin, type(optimizer).__name__


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)
