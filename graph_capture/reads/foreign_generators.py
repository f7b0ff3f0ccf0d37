"""Random generators outside PyTorch, held by a model or named in its code.

Their numbers are not part of a traced step: a plan would repeat those drawn during
capture. The recorder checks Python's and NumPy's global generators, because it knows
the module that draws.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NotFittingError
from .written_in_place import WrittenInPlace


@contextmanager
def new_generators_refused() -> Iterator[None]:
    """While active, refuse to make a NumPy generator without a seed.

    Its first number would differ each time.
    """
    before: Any = np.random.default_rng

    def default_rng(seed: Any = None) -> Any:
        if seed is None:
            raise NotFittingError(
                "forward makes a random generator of NumPy's, np.random.default_rng(), whose "
                "numbers a plan would repeat for ever. Draw with torch, or outside and pass the "
                "numbers as an argument"
            )
        return before(seed)

    np.random.default_rng = default_rng
    try:
        yield
    finally:
        np.random.default_rng = before


_KINDS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


@dataclass(frozen=True, slots=True)
class _Met:
    path: str
    generator: Any
    state: Any


class ForeignGenerators:
    """The generators that a step has met, with their states at that time."""

    def __init__(self) -> None:
        self._met: dict[int, _Met] = {}
        self._in_place = WrittenInPlace()

    def meet(self, value: Any, path: str) -> None:
        """Record a value's state if it is a generator, an array or an iterator."""
        if isinstance(value, _KINDS) and id(value) not in self._met:
            self._met[id(value)] = _Met(path, value, _state_of(value))
        self._in_place.meet(value, path)

    def refuse_draws(self) -> None:
        """Refuse a step that drew from them.

        Raises
        ------
        NotFittingError
            Names the first one whose state has changed; it may be an array or an iterator.
        """
        self._in_place.refuse_changes()
        for met in self._met.values():
            if not _same(met.state, _state_of(met.generator)):
                raise NotFittingError(
                    f"forward draws from {met.path!r}, a random generator of "
                    f"{type(met.generator).__module__.partition('.')[0]}'s: a plan would repeat "
                    "this one draw for ever. Draw with torch, or outside and pass the numbers as "
                    "an argument"
                )

    def put_back(self) -> None:
        """Undo every draw."""
        self._in_place.put_back()
        for met in self._met.values():
            if _same(met.state, _state_of(met.generator)):
                continue
            if isinstance(met.generator, random.Random):
                met.generator.setstate(met.state)
            elif isinstance(met.generator, np.random.RandomState):
                met.generator.set_state(met.state)
            else:
                _bits_of(met.generator).state = met.state


def _bits_of(generator: Any) -> Any:
    return generator.bit_generator if isinstance(generator, np.random.Generator) else generator


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.SystemRandom):
        return None  # it has no state, and no two eager runs draw alike
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return _bits_of(generator).state


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_same(value, b[key]) for key, value in a.items())
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)


__all__ = ["ForeignGenerators"]
