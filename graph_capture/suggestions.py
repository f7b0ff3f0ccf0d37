"""Error texts for unknown names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return an error text: the name, the nearest known name if any is close, and all known names.

    >>> unknown_name("strategy", "unifrom", ("none", "uniform"))
    "unknown strategy 'unifrom'; did you mean 'uniform'? known are none, uniform"
    """
    names = tuple(known)
    return f"unknown {what} {name!r}; {did_you_mean(name, names)}known are {', '.join(names)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question followed by a space; empty where no known name is close.

    >>> did_you_mean("auot", ["auto", "dtr"]), did_you_mean("magic", ["auto", "dtr"])
    ("did you mean 'auto'? ", '')
    """
    near = get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
