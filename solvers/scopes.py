"""What a bound speaks of: the class of schedules that it is proven for."""

from __future__ import annotations

from enum import StrEnum


class BoundScope(StrEnum):
    """A class of schedules, by a code that files keep."""

    BASE_ORDER = "base_order"  # first runs in base order, recomputations anywhere
    STAGED = "staged"  # see ``stages.py``
    ANY_ORDER = "any_order"  # see ``any_order/order_free_bound.py``
    OWN_ORDER = "own_order"  # as BASE_ORDER, of the schedule's own order, which is not eager's
    OWN_ORDER_STAGED = "own_order_staged"  # as STAGED, of the schedule's own order
    INSIDE_BLOCKS = "inside_blocks"  # see ``block_plans/solve.py``

    @property
    def words(self) -> str:
        """For people, to stand behind "among" or "for"."""
        return _WORDS[self]

    @property
    def in_own_order(self) -> BoundScope:
        """The same class where the base order is the schedule's own and not eager's."""
        return _IN_OWN_ORDER[self]


_BASE_ORDER = "every schedule whose first runs keep the base order"
_STAGED = "schedules that run each operator at most once, in base order, between first runs"
_OWN = "which here is the order of this plan and not eager's"

_WORDS = {
    BoundScope.BASE_ORDER: _BASE_ORDER,
    BoundScope.STAGED: _STAGED,
    BoundScope.ANY_ORDER: "every schedule whose first runs stay on eager's side of the loss, in "
    "any order",
    BoundScope.OWN_ORDER: f"{_BASE_ORDER}, {_OWN}",
    BoundScope.OWN_ORDER_STAGED: f"{_STAGED}, {_OWN}",
    BoundScope.INSIDE_BLOCKS: "schedules in eager's order that repeat a block's operators inside "
    "that block's own forward or backward",
}

_IN_OWN_ORDER = {
    BoundScope.BASE_ORDER: BoundScope.OWN_ORDER,
    BoundScope.STAGED: BoundScope.OWN_ORDER_STAGED,
}

_FROM_WORDS = {words: scope for scope, words in _WORDS.items()}


def short_words(scope: BoundScope) -> str:
    """The same in fewer words, where staged schedules are known by their name."""
    return scope.words.replace(_STAGED, "staged schedules")


def staged_words(num_runs: int) -> str:
    """MOCCASIN's class: staged, and each operator at most ``num_runs`` times."""
    return f"{_STAGED}, and no more than {num_runs} times"


def code_of(scope: str) -> str:
    """The code of a scope that an older file has in words; anything else as it is."""
    return _FROM_WORDS.get(scope, scope)
