"""Which modules cannot have a plan of their own inside a step, by how the step calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graph_capture.apart.opaque_calls import SeenCall
from graph_capture.calls.autocast import AutocastState
from graph_capture.calls.call_spec import specs_of, tensor_names
from graph_capture.calls.spread_out import LOCAL

from ..errors import PlanError


class UnfitBlockError(PlanError):
    """A module cannot have a plan of its own inside this step.

    Parameters
    ----------
    path
        The module.
    message
        Why, and what to do.
    others
        Others that cannot for the same reason.
    by_itself
        Whether the reason lies in the module, so that it holds for all that look alike.
    """

    def __init__(
        self, path: str, message: str, others: Sequence[str] = (), *, by_itself: bool = False
    ) -> None:
        super().__init__(message)
        self.paths = (path, *others)
        self.by_itself = by_itself


def refuse_unfit(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    seen: Sequence[SeenCall],
    out_of_order: Mapping[int, int | str],
    autocast_of: Mapping[str, AutocastState],
) -> None:
    """Refuse blocks whose calls no plan inside them can take the place of.

    Parameters
    ----------
    modules
        The blocks, by path.
    seen
        Their calls in the step.
    out_of_order
        Per call, what is used in an order other than eager's; see ``OpaqueCalls.look_at``.
    autocast_of
        What each block that was called runs under.
    """
    called = Counter(call.path for call in seen)
    twice = [path for path, count in called.items() if count > 1]
    if twice:
        raise UnfitBlockError(
            twice[0],
            f"block {twice[0]!r} is called {called[twice[0]]} times in one step, and a plan "
            "inside it would hold what several calls save: plan the module around it as a "
            "block",
            twice[1:],
        )
    unordered = [call for call in seen if call.number in out_of_order]
    if unordered:
        call, leaf = unordered[0], out_of_order[unordered[0].number]
        name = tensor_names(call.arguments)[leaf] if isinstance(leaf, int) else leaf
        raise UnfitBlockError(
            call.path,
            f"block {call.path!r} uses {name!r} more than once, and others use it later: "
            "its gradients would be added in another order than eager's, with other last "
            "bits. Name smaller blocks, or leave this one out of blocks=",
            [other.path for other in unordered[1:]],
        )
    _refuse_shared_casts(model, modules, autocast_of)
    never = [path for path in modules if path not in called]
    if never:
        raise UnfitBlockError(
            never[0],
            f"block {never[0]!r} is not called with gradients in this step (eval mode, "
            "no_grad, a branch that is not taken?): leave it out of blocks=",
            never[1:],
        )


def refuse_divided_call(path: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a block that is called with a ``DTensor``."""
    for name, spec in zip(tensor_names(arguments), specs_of(arguments), strict=True):
        if spec.division is not None:
            raise UnfitBlockError(
                path,
                f"block {path!r} is called with a DTensor as {name!r} ({spec.division}); {LOCAL}",
            )


def _refuse_shared_casts(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    autocast_of: Mapping[str, AutocastState],
) -> None:
    """Refuse blocks that share with others a parameter which autocast casts once for all.

    Eager adds the gradients of the cast, and casts their sum; a planned block has a cast of
    its own, and adds what has been cast.
    """
    users: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        block = next((b for b in modules if path == b or path.startswith(f"{b}.")), path)
        for parameter in vars(module)["_parameters"].values():
            users.setdefault(id(parameter), set()).add(block)
    shared: dict[str, str] = {}
    for path, module in modules.items():
        autocast = autocast_of.get(path)
        if autocast is None or autocast.dtype is None or not autocast.caches:
            continue
        for name, parameter in module.named_parameters():
            is_cast = parameter.dtype == torch.float32 and parameter.requires_grad
            if is_cast and len(users[id(parameter)]) > 1:
                shared.setdefault(path, name)
    if shared:
        path, name = next(iter(shared.items()))
        raise UnfitBlockError(
            path,
            f"block {path!r} shares {name!r} with modules outside of it, and autocast casts it "
            "once for all of them: its gradients would be added after the cast back and not "
            "before, with other bits than eager's. Name other blocks, switch the cache off "
            "(torch.autocast(cache_enabled=False)), or plan the whole step",
            [other for other in shared if other != path],
        )
