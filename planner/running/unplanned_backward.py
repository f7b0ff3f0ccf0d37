"""Notice a training step that never reached the plan of its model.

A trainer may replace ``model.forward``, and a loop may call only a part of the planned
module: the plan then does not see the step. But in every training step a gradient
arrives at a parameter, so one parameter of a planned model is watched.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from graph_capture.captured_step import CapturedStep
from graph_capture.private_torch.modules import parameters_of

from ..base.unwrap import is_reached
from .tally import Tally

_MISSED = "a training step of a planned {name} was not run by its plan, and its budget is not kept"
_BUILD_FIRST = "build the trainer first, then plan and apply"


def _nothing() -> None:
    """No gradient has arrived."""


class Watched(Protocol):
    """The replacement of the forward of the watched module."""

    model: nn.Module
    tally: Tally
    unwatched: int
    removed: bool


@dataclass(kw_only=True)
class UnplannedBackward:
    """Watches one parameter of a planned model.

    Parameters
    ----------
    planned
        Counts the backward passes that it has seen. It is not kept alive: Python's garbage
        collector does not see through a hook on a tensor.
    parameter
        The watched parameter; the hook on it must not keep it alive either.
    module, name
        The module that holds it, and its name there.
    missed, advice
        What is said of a step that was not noticed, with the class of the model as
        ``{name}``, and what to do if its forward was replaced.
    """

    planned: weakref.ref[Watched]
    parameter: weakref.ref[torch.Tensor]
    module: weakref.ref[nn.Module]
    name: str
    missed: str = _MISSED
    advice: str = _BUILD_FIRST
    _num_expected: Counter[int] = field(default_factory=Counter)  # by thread
    _num_accompanied: int = 0  # planned backward passes with other gradients beside them
    _gradient: Callable[[], torch.Tensor | None] = field(default=_nothing, repr=False)
    _handle: RemovableHandle | None = field(default=None, repr=False)

    @classmethod
    def of(cls, planned: Watched, captured: CapturedStep) -> UnplannedBackward | None:
        """Watch the first parameter that a step differentiates; ``None`` if there is none."""
        modules = dict(planned.model.named_modules(remove_duplicate=False))
        for node, _ in captured.step.gradients:
            path, _, name = node.meta["target"].rpartition(".")
            module = modules.get(path)
            parameter = None if module is None else parameters_of(module).get(name)
            # torch.func.functional_call may put what is computed from parameters in their place.
            if module is None or parameter is None or not parameter.is_leaf:
                continue
            if node.meta["role"] == "parameter":
                return cls._begun(planned, parameter, module, name)
        return None

    @classmethod
    def of_first(cls, planned: Watched, missed: str, advice: str) -> UnplannedBackward | None:
        """Watch the first trainable parameter of a model; ``None`` where there is none."""
        for module in planned.model.modules():
            for name, parameter in parameters_of(module).items():
                if parameter is not None and parameter.requires_grad and parameter.is_leaf:
                    return cls._begun(planned, parameter, module, name, missed, advice)
        return None

    @classmethod
    def _begun(
        cls,
        planned: Watched,
        parameter: nn.Parameter,
        module: nn.Module,
        name: str,
        missed: str = _MISSED,
        advice: str = _BUILD_FIRST,
    ) -> UnplannedBackward:
        watch = cls(
            planned=weakref.ref(planned),
            parameter=weakref.ref(parameter),
            module=weakref.ref(module),
            name=name,
            missed=missed,
            advice=advice,
        )
        watch._handle = parameter.register_post_accumulate_grad_hook(Listening(watch))
        return watch

    def is_in_place(self) -> bool:
        """Whether the watched parameter is still the model's."""
        module, parameter = self.module(), self.parameter()
        return (
            module is not None
            and parameter is not None
            and parameters_of(module).get(self.name) is parameter
        )

    def stop(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()

    def arrived(self) -> None:
        """Note that a gradient has arrived at the parameter."""
        planned = self.planned()
        if planned is None or planned.unwatched or planned.removed:
            return
        tally = planned.tally
        parameter = self.parameter()
        gradient = None if parameter is None else parameter.grad
        added = gradient is not None and gradient is self._gradient()  # to that of this step
        self._gradient = _nothing if gradient is None else weakref.ref(gradient)
        thread = threading.get_ident()
        if tally.num_expected > self._num_expected[thread]:
            self._num_expected[thread] = tally.num_expected
            return
        name = type(planned.model).__name__
        is_called = planned.model.training and is_reached(planned.model, planned)
        if added and is_called and tally.num_backward > self._num_accompanied:
            self._num_accompanied = tally.num_backward
            tally.say(
                "gradient from elsewhere",
                f"a gradient came to the parameters of a planned {name} from elsewhere than a call "
                "of it: from a term of the loss that is made of parameters, say, or from a part of "
                "the module. What that takes is not in the plan",
            )
            return
        tally.num_unplanned += 1
        self._num_expected[thread] = tally.num_expected
        if not planned.model.training:
            why = "the model is in eval mode, in which it runs its own forward"
        elif is_reached(planned.model, planned):
            why = (
                f"the loop did not call this {name}, but a part of it, or another module with its "
                "parameters; plan the module that the loop calls"
            )
        else:
            stand_in = vars(planned.model).get("forward", type(planned.model).forward)
            where = getattr(stand_in, "__module__", None) or type(stand_in).__module__
            what = getattr(stand_in, "__qualname__", type(stand_in).__qualname__)
            why = (
                f"its forward was replaced by {where}.{what} after the plan was applied; "
                f"{self.advice}"
            )
        tally.last_mismatch = why
        tally.say("unplanned", f"{self.missed.format(name=name)}: {why}")


class Listening:
    """The hook on the watched parameter, which keeps nobody alive."""

    def __init__(self, watch: UnplannedBackward) -> None:
        self._known = weakref.ref(watch)

    def __call__(self, _parameter: torch.Tensor) -> None:
        listener = self._known()
        if listener is not None:
            listener.arrived()
