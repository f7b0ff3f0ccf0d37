"""Error texts for calls that differ from the planned one."""

from __future__ import annotations

from ..errors import CallMismatchError

# What trainers add to a batch, by the name in a difference.
_ADDED = {
    "num_items_in_batch": "Transformers' Trainer adds num_items_in_batch to every batch",
    "use_cache": "trainers pass use_cache=False",
    "fused_lm_head": "TRL's trainers add fused_lm_head=True",
}


def mismatch(different: str) -> CallMismatchError:
    """Build the error for a call with the difference ``different``."""
    return CallMismatchError(
        f"this call is not the planned one: {different}{hint_at(different)}. Make a plan for it, "
        "or apply the plan with on_shape_change='adapt', 'replan' or 'unplanned'"
    )


def hint_at(different: str) -> str:
    """Return where an argument that the sample lacks comes from, for those that trainers add."""
    place = different.partition(" is ")[0]
    who = _ADDED.get(place.rpartition(".")[2])
    return "" if who is None else f" ({who}: have it in the sample, too)"
