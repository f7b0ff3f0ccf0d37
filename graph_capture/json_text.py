"""JSON as this project's files use it: UTF-8, finite numbers, no duplicate keys."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def read_json(text: str | bytes) -> Any:
    """Decode ``text``.

    Raises
    ------
    ValueError
        When it is not such JSON: not UTF-8, nested too deeply, with an infinite number
        or a duplicate key.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(
            decoded,
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_without_doubles,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that a file may hold")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is too large for a number")
    return number


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"{double!r:.100} stands twice in one object")
    return found
