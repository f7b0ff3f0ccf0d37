"""Measure an optimizer's state and the cost of its step, without running it for real."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..absent_cuda.guard import ensure_cuda_guard
from ..calls.spread_out import local_part
from ..calls.storage_id import storage_id
from ..capture_lock import holds_capture_lock
from ..costs.allocator import block_bytes
from ..costs.cost_model import Call
from ..costs.target import Target
from ..private_torch.aten import local_scalar_dense
from ..private_torch.dispatch import TorchDispatchMode
from ..private_torch.fake_tensors import FakeTensor, FakeTensorMode
from ..private_torch.modules import FOREACH_TYPES
from ..recording.fake_call_cache import FakeCallCache
from ..recording.fake_inputs import FakeInputs
from ..suggestions import did_you_mean
from .memory_meter import MemoryMeter, Moment

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
class ParameterStep:
    """What it takes to update one parameter alone.

    Parameters
    ----------
    workspace_bytes
        Bytes beside parameter, gradient and state.
    calls
        The calls that are dispatched, for costing.
    moments
        What is allocated once each call has its results.
    """

    workspace_bytes: int = 0
    calls: tuple[tuple[Any, tuple, dict, Any], ...] = ()
    moments: tuple[Moment, ...] = ()

    def with_scratch(self, scratch_bytes: Callable[[Call], int]) -> ParameterStep:
        """Return a copy that includes what its kernels allocate and free beside their results."""
        most = self.workspace_bytes
        for (func, args, kwargs, out), moment in zip(self.calls, self.moments, strict=True):
            call = Call(func=func, args=args, kwargs=kwargs, out=out, grad_enabled=False)
            most = max(most, moment.live_bytes + scratch_bytes(call))
        return replace(self, workspace_bytes=most)


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
    for_parameter
        What each parameter's own step takes, by its name, where an optimizer in a hook
        updates one after the other; ``calls`` is then empty. Empty for a plan from a file.
    step_ns
        Nanoseconds of the step if its calls are no longer known, as in a plan from a
        file; ``None`` if it was not priced.
    """

    name: str
    state_bytes: int
    workspace_bytes: int
    calls: tuple[tuple[Any, tuple, dict, Any], ...] = ()
    step_ns: int | None = None
    for_parameter: Mapping[str, ParameterStep] = field(default_factory=dict)

    def with_scratch(self, scratch_bytes: Callable[[Call], int]) -> OptimizerStep:
        """Return a copy whose steps of single parameters include their kernels' scratch memory."""
        if not self.for_parameter:
            return self
        distinct = {id(step): step for step in self.for_parameter.values()}
        counted = {key: step.with_scratch(scratch_bytes) for key, step in distinct.items()}
        return replace(
            self,
            workspace_bytes=max(step.workspace_bytes for step in counted.values()),
            for_parameter={name: counted[id(s)] for name, s in self.for_parameter.items()},
        )


def _own_part(parameter: torch.Tensor) -> torch.Tensor:
    return local_part(parameter).detach()


@holds_capture_lock
def measure_optimizer(
    optimizer: torch.optim.Optimizer | str | None,
    model: nn.Module,
    target: Target,
    *,
    in_hooks: bool = False,
    part_of: Callable[[torch.Tensor], torch.Tensor] = _own_part,
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
    in_hooks
        Whether hooks update each parameter alone, when its gradient arrives.
    part_of
        What of a parameter this process updates: all of it, or its shard.

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
        twin, name = _twin(optimizer, model, FakeInputs(fake_mode, target), part_of)
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
        if in_hooks:
            names = {id(p): name for name, p in model.named_parameters()}
            originals = _updated(optimizer, model)
            for_parameter = {
                names[id(p)]: step
                for p, step in zip(originals, _steps_alone(twin, known), strict=True)
                if id(p) in names
            }
            return OptimizerStep(
                name=name,
                state_bytes=sum(state.values()),
                workspace_bytes=max((s.workspace_bytes for s in for_parameter.values()), default=0),
                for_parameter=for_parameter,
            )
        meter = MemoryMeter(known=known.__contains__)
        with meter:
            twin.step()
    return OptimizerStep(
        name=name,
        state_bytes=sum(state.values()),
        workspace_bytes=meter.peak_bytes,
        calls=tuple(meter.calls),
    )


@contextmanager
def updating_only(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> Iterator[None]:
    """While active, ``optimizer.step()`` updates one of its parameters alone, or nothing at all
    where it is none of its own."""
    optimizer = _innermost(optimizer)
    groups = optimizer.param_groups
    group = next((g for g in groups if any(p is parameter for p in g["params"])), None)
    optimizer.param_groups = [] if group is None else [group]
    parameters = [] if group is None else group["params"]
    if group is not None:
        group["params"] = [parameter]
    try:
        yield
    finally:
        if group is not None:
            group["params"] = parameters
        optimizer.param_groups = groups


def _updated(optimizer: torch.optim.Optimizer | str, model: nn.Module) -> list[torch.Tensor]:
    """The parameters that an optimizer updates, in the order of a twin's."""
    if isinstance(optimizer, str):
        return [p for p in model.parameters() if p.requires_grad]
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _steps_alone(twin: torch.optim.Optimizer, known: AbstractSet[int]) -> Iterator[ParameterStep]:
    """What a second step of each parameter alone takes; those that look alike are asked once."""
    found: dict[Any, ParameterStep] = {}
    for number, group in enumerate(twin.param_groups):
        for p in list(group["params"]):
            looks = number, p.shape, p.stride(), p.dtype, p.device
            if looks not in found:
                meter = MemoryMeter(known=known.__contains__)
                with updating_only(twin, p), meter:
                    twin.step()
                found[looks] = ParameterStep(
                    workspace_bytes=meter.peak_bytes,
                    calls=tuple(meter.calls),
                    moments=tuple(meter.moments),
                )
            yield found[looks]


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
    optimizer: torch.optim.Optimizer | str,
    model: nn.Module,
    twins: FakeInputs,
    part_of: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.optim.Optimizer, str]:
    parts: list[torch.Tensor] = []  # twins are known by the memory of what they stand for

    def stand_in(p: torch.Tensor) -> nn.Parameter:
        parts.append(part_of(p))
        return nn.Parameter(twins.of(parts[-1]), requires_grad=p.requires_grad)

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
