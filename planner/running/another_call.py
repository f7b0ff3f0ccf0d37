"""Error texts for calls that differ from the planned one."""

from __future__ import annotations

from ..errors import CallMismatchError, OutcomeChangedError

# What trainers add to a batch, by the name in a difference.
_ADDED = {
    "num_items_in_batch": "Transformers' Trainer adds num_items_in_batch to every batch",
    "use_cache": "trainers pass use_cache=False",
    "fused_lm_head": "TRL's trainers add fused_lm_head=True",
}


def mismatch(different: str, *, inside: bool = False) -> CallMismatchError:
    """Build the error for a call with the difference ``different``.

    Parameters
    ----------
    inside
        Whether the call is one of a block, which cannot plan another call by itself.
    """
    policies = "'unplanned'" if inside else "'adapt', 'replan' or 'unplanned'"
    return CallMismatchError(
        f"this call is not the planned one: {different}{hint_at(different)}. Make a plan for it, "
        f"or apply the plan with on_shape_change={policies}"
    )


def another_way(changed: OutcomeChangedError, *, inside: bool) -> OutcomeChangedError:
    """Add what to do to the error for a step in which a value leads another way.

    Parameters
    ----------
    inside
        As for :func:`mismatch`.
    """
    policies = "'adapt' or 'replan', which plan for this way, too, or 'unplanned'"
    if inside:
        policies = "'unplanned', which runs the block's own forward in such a step"
    return OutcomeChangedError(
        f"{changed} If that line raises for this input, so does the model without the plan "
        f"(remove it). Else apply the plan with on_shape_change={policies}, or make a plan on "
        "such an input"
    )


def in_block(path: str, error: Exception) -> Exception:
    """Build the same error with the name of the block that it is of."""
    return type(error)(f"block {path!r}: {error}")


def hint_at(different: str) -> str:
    """Return where an argument that the sample lacks comes from, for those that trainers add."""
    place = different.partition(" is ")[0]
    who = _ADDED.get(place.rpartition(".")[2])
    return "" if who is None else f" ({who}: have it in the sample, too)"
