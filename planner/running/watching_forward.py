"""The replacement for a module's forward until its first training call is known."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..base.forward_slot import Forward, StandIn
from .surroundings import foreign_surroundings
from .tally import Tally
from .unplanned_backward import UnplannedBackward

Seen = Callable[[tuple, dict[str, Any]], None]

_NEVER_CALLED = (
    "a training step of a watched {name} did not come to its watch(), so that nothing was "
    "recorded or planned"
)
_WATCH_LATER = "build the trainer first, then watch"


class WatchingForward(StandIn):
    """Stands in for a module's ``forward`` and reports its first training call.

    Calls in ``eval()`` mode and under ``no_grad`` run the module's own forward and are
    not reported. Whoever is told of the first training call may put a plan in this
    place: that call and all others then go on by the plan. Where somebody has wrapped
    this forward meanwhile, it stays behind the wrapper and passes calls on.

    A copy of the module is not watched.

    Parameters
    ----------
    model
        The module.
    seen
        Is told of the first training call, before it runs, with its positional and
        keyword arguments. Until it has returned, the next call counts as the first.
    """

    def __init__(self, model: nn.Module, seen: Seen | None) -> None:
        super().__init__(model)
        self._seen = seen
        self._begin()

    def _begin(self) -> None:
        """Set what neither a copy nor a pickle includes."""
        self.tally = Tally()
        self.removed = self._seen is None
        self._follower: StandIn | None = None
        self._backward: UnplannedBackward | None = None
        self._lock = threading.RLock()
        self._watch = torch.compiler.disable(self._call)  # torch.compile: one opaque call
        if self._seen is not None:
            self._backward = UnplannedBackward.of_first(self, _NEVER_CALLED, _WATCH_LATER)

    @property
    def __wrapped__(self) -> Forward:
        """What calls come to in the end; tools that look behind wrappers find a plan here."""
        return self.unplanned if self._follower is None else self._follower  # type: ignore[return-value]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.unplanned)

    @property
    def __code__(self) -> Any:  # torch.export looks for it
        return self.unplanned.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:  # bound to it as a method, by accelerate for one
            args = args[1:]
        quiet = self.removed or self.suspended
        if not quiet and self.model.training and torch.is_grad_enabled():
            return self._watch(args, kwargs)
        return self.__wrapped__(*args, **kwargs)

    def _call(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        foreign = foreign_surroundings()
        if foreign is None:
            with self._lock:  # several threads may make their first call at once
                if not self.removed:
                    assert self._seen is not None
                    self._seen(args, kwargs)
                    self.stop()
            return self.__wrapped__(*args, **kwargs)
        self.tally.num_unplanned += 1
        self.tally.say(
            "unplanned",
            f"a training step of a watched {type(self.model).__name__} is not recorded: {foreign}",
        )
        return self.unplanned(*args, **kwargs)

    def stop(self) -> None:
        """Pass all calls on from now on."""
        self.removed = True
        self._seen = None
        if self._backward is not None:
            self._backward.stop()

    def follow_with(self, planned: StandIn) -> None:
        """Pass all calls on to a plan from now on, for callers that still hold this."""
        self.stop()
        planned.own_forward = self.own_forward
        self._follower = planned

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchingForward:
        twin = WatchingForward(copy.deepcopy(self.model, memo), None)
        twin.own_forward = copy.deepcopy(self.own_forward, memo)
        twin._follower = copy.deepcopy(self._follower, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        made = {"tally", "removed", "_follower", "_backward", "_lock", "_watch", "_seen"}
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._seen = None
        self._begin()
