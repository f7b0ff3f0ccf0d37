"""Take the sample from the training loop itself: watch a model, and plan its first call."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graph_capture.loop.data_parallel import DataParallel
from graph_capture.private_torch.modules import active_data_parallel

from .base.budget import read_budget
from .base.forward_slot import original_forward, put_stand_in, stand_in_of, take_stand_in
from .base.step_spec import check_model
from .errors import PlanError
from .optimize import optimize
from .plan import Plan
from .plan_record import OnShapeChange
from .running.watching_forward import WatchingForward

_BUDGETS = ("budget", "budget_gb", "budget_bytes")
_OPTIONS = frozenset(inspect.signature(optimize).parameters) - {"model", "sample_input"}


class Watched:
    """What :func:`watch` has seen of a model so far.

    Attributes
    ----------
    model
        The model.
    plan
        The plan that was made for the first training call, and applied; ``None``
        before that call, and where no budget was given.
    """

    def __init__(
        self, model: nn.Module, options: Mapping[str, Any], on_shape_change: OnShapeChange
    ) -> None:
        self.model = model
        self.plan: Plan | None = None
        self._options = dict(options)
        self._on_shape_change = on_shape_change
        self._sample: tuple[Any, ...] | dict[str, Any] | None = None
        self._autocast: torch.dtype | None = None
        self._forward = WatchingForward(model, self._first_call)

    @property
    def sample_input(self) -> tuple[Any, ...] | dict[str, Any]:
        """The arguments of the first training call, as :func:`planner.optimize` takes them.

        They are the loop's own tensors, which stay in memory as long as this does.

        Raises
        ------
        PlanError
            When there was no training call yet, or when the sample was given up because
            a plan was made for it.
        """
        if self._sample is not None:
            return self._sample
        name = type(self.model).__name__
        if self.plan is not None:
            raise PlanError(
                f"the first call of this {name} was planned for, and its tensors were let go; "
                "watch(model) without a budget keeps them"
            )
        raise PlanError(
            f"this {name} has had no training call yet since it is watched: run a step of the "
            "loop, in train() mode and with gradients on"
        )

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of the autocast around that call, on the model's device; ``None`` for none."""
        return self._autocast

    def stop(self) -> nn.Module:
        """Watch no longer; returns the model. A plan that was applied stays."""
        self._forward.stop()
        if stand_in_of(self.model) is self._forward:
            take_stand_in(self.model, self._forward)
        return self.model

    def _first_call(self, args: tuple, kwargs: dict[str, Any]) -> None:
        sample = _as_sample(self.model, args, kwargs)
        self._autocast = _active_autocast(self.model)
        if not any(self._options.get(name) is not None for name in _BUDGETS):
            self._sample = sample
            self.stop()
            return
        self._plan(sample)

    def plan_for(self, args: tuple, kwargs: dict[str, Any]) -> Plan:
        """Plan for a call that the loop has not made yet, and apply the plan."""
        return self._plan(_as_sample(self.model, args, kwargs))

    def _plan(self, sample: tuple[Any, ...] | dict[str, Any]) -> Plan:
        around = active_data_parallel()  # the call comes through its forward
        found = {} if around is None else {"distributed": DataParallel.of_wrapper(around)}
        plan = optimize(self.model, sample, **{**found, **self._options})
        gc.collect()  # cycles of what was captured hold copies of the sample
        plan.apply(self.model, on_shape_change=self._on_shape_change)
        self.plan = plan
        return plan


def watch(
    model: nn.Module,
    *,
    budget: str | None = None,
    budget_gb: float | str | None = None,
    budget_bytes: int | None = None,
    on_shape_change: OnShapeChange = "adapt",
    **options: Any,
) -> Watched:
    """Wait for the first training call of ``model``, and plan for what is really passed.

    Nobody has to guess what a trainer passes: keyword arguments that it adds, autocast,
    a forward that it has wrapped. With a budget the first training call (in ``train()``
    mode, with gradients on) is planned before it runs, as :func:`planner.optimize` would,
    the plan is applied, and that call already goes by it. Without a budget the call is only
    recorded, for ``optimize(model, watched.sample_input, …)``, and the model is left as it
    was. Planning computes with stand-ins for tensors, so it stays within the budget, too.

    Parameters
    ----------
    model
        The module that the loop calls, before or after a trainer is built around it. A
        trainer that puts a forward of its own in the place of the model's (TRL) has to be
        built before.
    budget, budget_gb, budget_bytes
        At most one of them, as for :func:`planner.optimize`.
    on_shape_change
        What later calls do that differ from the first, see :meth:`planner.Plan.apply`. The
        default differs from there: where nobody names the call, nobody knows that it is the
        only one.
    **options
        The other arguments of :func:`planner.optimize`: ``loss_fn=``, ``optimizer=``, …

    Returns
    -------
    Watched

    Raises
    ------
    TypeError
        When ``model`` is not a module, or an option is none of ``optimize``.
    PlanError
        When the model is watched already, or has a plan. What ``optimize`` raises comes from
        the first training call.

    Examples
    --------
    >>> layer = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    >>> watched = watch(layer, budget_gb="1MB", loss_fn=torch.sum, optimizer="adamw")
    >>> layer(torch.ones(2, 8)).sum().backward()
    >>> watched.plan.predicted_peak_bytes <= 10**6
    True
    """
    check_options(options)
    check_model(model, training=False)
    before = stand_in_of(model)
    if before is not None:
        what = "is watched already" if isinstance(before, WatchingForward) else "has a plan"
        undo = "stop() that one" if isinstance(before, WatchingForward) else "Plan.remove(model)"
        raise PlanError(f"this {type(model).__name__} {what}: {undo} first")
    budgets = {"budget": budget, "budget_gb": budget_gb, "budget_bytes": budget_bytes}
    if any(given is not None for given in budgets.values()):
        read_budget(budget, budget_gb, budget_bytes)  # refuses an invalid one at once
    watched = Watched(model, {**options, **budgets}, on_shape_change)
    put_stand_in(model, watched._forward)
    return watched


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what is no argument of :func:`planner.optimize`, before a training begins.

    Raises
    ------
    TypeError
        Names the first one.
    ValueError
        When the plan is to be made in blocks.
    """
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise TypeError(
            f"the arguments of optimize() are understood, and {unknown[0]!r} is none of them; "
            f"there are {', '.join(sorted(_OPTIONS))}"
        )
    if options.get("granularity", "step") != "step" or options.get("blocks", "auto") != "auto":
        raise ValueError(
            "a first call is planned as a whole step; to plan in blocks, watch(model) without a "
            "budget, and pass its sample_input to optimize(…, granularity='blocks')"
        )


def _as_sample(
    model: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, ...] | dict[str, Any]:
    """The call as a tuple of positional or a dict of keyword arguments."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    signature = inspect.signature(original_forward(model))
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            raise PlanError(
                f"the first call of this {type(model).__name__} has keyword arguments beside "
                f"{name!r}, which can only be passed by position; plan a module whose forward "
                "takes all of them by name"
            )
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def _active_autocast(model: nn.Module) -> torch.dtype | None:
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
