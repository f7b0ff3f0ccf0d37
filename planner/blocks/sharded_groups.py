"""Which parameters ``fully_shard`` gathers and reduces together, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from graph_capture.apart.opaque_calls import SeenCall
from graph_capture.calls.spread_out import is_spread
from graph_capture.calls.storage_id import storage_id
from graph_capture.captured_step import CapturedStep, storages_by_memory
from graph_capture.costs.allocator import block_bytes
from graph_capture.loop.fully_sharded import FullySharded, GroupBytes

from .sharded_step import Group


def sharded_groups(
    model: nn.Module, rest: CapturedStep, calls: Sequence[SeenCall], options: FullySharded
) -> list[Group]:
    """Return the groups of a model whose blocks and root are sharded, the root's first.

    Parameters
    ----------
    rest
        The captured step around the blocks; groups have its storages.
    calls
        The blocks' calls, in the order of the forward pass.

    Raises
    ------
    ValueError
        When a parameter cannot be sharded, or two groups share one.
    """
    divided = next((name for name, p in model.named_parameters() if is_spread(p)), None)
    if divided is not None:
        raise ValueError(
            f"distributed='fsdp2:…' is for a model whose parameters are whole, and {divided!r} is "
            "a DTensor, as parallelize_module makes them: leave distributed= out, which plans for "
            "this rank's parts, or plan before parallelize_module"
        )
    torch_type = rest.device_type
    at = storages_by_memory(rest.unplanned_carriers)
    storage_of: dict[str, int] = {}
    for node in rest.step.graph.find_nodes(op="placeholder"):
        if node.meta["role"] == "parameter":
            k = at[storage_id(node.meta["val"])]
            storage_of.update((name, k) for name in node.meta["targets"])
    gradient_of = {
        at[storage_id(leaf.meta["val"])]: gradient.meta["val"]
        for leaf, gradient in rest.step.gradients
        if leaf.meta["role"] == "parameter"
    }
    parameters = _by_group(model, [call.path for call in calls])
    groups = []
    for path, named in parameters.items():
        of_storage = {storage_of[name]: p for name, p in named.items()}
        gradients = [gradient_of[k] for k in of_storage if k in gradient_of]
        call = next((i for i, call in enumerate(calls) if call.path == path), None)
        groups.append(
            Group(
                path=path,
                call=call,
                parameters={
                    k: block_bytes(_shard_bytes(options, path, p), torch_type)
                    for k, p in of_storage.items()
                },
                gradients=tuple(sorted({at[storage_id(value)] for value in gradients})),
                num_bytes=GroupBytes.of(options, list(of_storage.values()), gradients, torch_type),
                at_end=call is not None
                and not any(isinstance(leaf, int) for leaf in calls[call].form.leaves),
            )
        )
    return groups


def _shard_bytes(options: FullySharded, path: str, parameter: torch.Tensor) -> int:
    try:
        return options.shard_bytes(parameter)
    except ValueError as error:
        raise ValueError(f"a parameter of {path or 'the model'!r}: {error}") from error


def _by_group(model: nn.Module, paths: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """The parameters of the root and of each block by name, without groups that have none."""
    found: dict[str, dict[str, torch.Tensor]] = {path: {} for path in ("", *paths)}
    place: dict[int, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = next((p for p in paths if name.startswith(f"{p}.")), "")
        other, first = place.setdefault(id(parameter), (path, name))
        if other != path:
            raise ValueError(
                f"{first!r} and {name!r} are one parameter, and fully_shard cannot gather it with "
                "two groups: name other blocks in blocks=, so that both lie in the same one or in "
                "none"
            )
        found[path][name] = parameter
    return {path: named for path, named in found.items() if named}


__all__ = ["sharded_groups"]
