"""Where the slice relaxation enforces memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """Base positions ``begin … end - 1``; the last one is the slice."""

    begin: int
    end: int

    @property
    def single(self) -> bool:
        """Whether it holds one base operator, so that it is a stage."""
        return self.end == self.begin + 1


@dataclass(frozen=True)
class Slicing:
    """Where memory is enforced.

    Parameters
    ----------
    slices
        Base positions.
    transients
        ``(f, x)``: memory is enforced while f runs again in the interval of x,
        as far as every schedule must respect it.
    events
        ``(f, x)``: the same, exactly, for staged schedules; x and the position
        before it are slices.
    """

    slices: frozenset[int]
    transients: frozenset[tuple[int, int]] = frozenset()
    events: frozenset[tuple[int, int]] = frozenset()

    @property
    def staged(self) -> bool:
        """Whether it speaks of staged schedules only."""
        return bool(self.events)

    def intervals(self, num_operators: int) -> list[Interval]:
        """Intervals in order; the last one reaches the end.

        Raises
        ------
        ValueError
            When a slice is no operator.
        """
        if not all(0 <= x < num_operators for x in self.slices):
            raise ValueError(f"slices beyond the {num_operators} operators: {sorted(self.slices)}")
        ends = sorted({x + 1 for x in self.slices} | {num_operators})
        return [Interval(a, b) for a, b in zip([0, *ends], ends) if b > 0]

    def __or__(self, other: Slicing) -> Slicing:
        return Slicing(
            self.slices | other.slices,
            self.transients | other.transients,
            self.events | other.events,
        )
