"""Resolve the user's choice to a cost model."""

from __future__ import annotations

from .cost_model import CostModel
from .profile import (
    Profile,
    ProfiledCosts,
)
from .roofline import Roofline
from .target import Target
from .user_costs import (
    TimeFunction,
    UserCosts,
)

CostModelChoice = str | Profile | CostModel | TimeFunction


def resolve_cost_model(asked: CostModelChoice, target: Target) -> CostModel:
    """Return the cost model that ``asked`` names.

    Parameters
    ----------
    asked
        ``"roofline"``; ``"profile"`` or a :class:`~.profile.Profile`; a function
        that returns microseconds of a :class:`~.cost_model.Call`, or ``None`` for
        the calls that the roofline is to price; or a
        :class:`~.cost_model.CostModel`.

    Raises
    ------
    ValueError
        When it is none of these, or when calls are to be timed on a device that is not
        at hand.
    """
    roofline = Roofline(target.device)
    if isinstance(asked, CostModel):
        return asked
    if asked == "roofline":
        return roofline
    if asked == "profile":
        return ProfiledCosts(target, Profile())
    if isinstance(asked, Profile):
        return ProfiledCosts(target, asked)
    if callable(asked):
        return UserCosts(asked, roofline)
    raise ValueError(f"cost_model is 'roofline', 'profile' or a function, got {asked!r}")
