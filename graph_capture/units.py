"""Parse and format bytes and times. 1 GB is 10^9 bytes, 1 GiB is 2^30."""

from __future__ import annotations

import math
import re

from .suggestions import did_you_mean

_BYTE_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(quantity: float | str, *, default_unit: str = "b") -> int:
    """Bytes of a number or of a string such as ``"40GiB"``.

    Parameters
    ----------
    quantity
        A finite, positive number, counted in ``default_unit``, or a string
        that may name its own unit.
    default_unit
        One of b, kb, mb, gb, tb, kib, mib, gib, tib (case is ignored).

    Raises
    ------
    ValueError
        When it is not a positive number, or the unit is unknown.

    Examples
    --------
    >>> parse_bytes("40GiB")
    42949672960
    >>> parse_bytes(1.5, default_unit="gb")
    1500000000
    """
    if isinstance(quantity, bool) or not isinstance(quantity, (int, float, str)):
        raise ValueError(f"not an amount of memory: {quantity!r}; write 40, 40.0 or '40GiB'")
    unit = default_unit
    if isinstance(quantity, str):
        match = _QUANTITY.fullmatch(quantity)
        if match is None:
            raise ValueError(f"not an amount of memory: {quantity!r}; write '40GB' or '40GiB'")
        number, unit = float(match[1]), match[2] or default_unit
    else:
        number = quantity
    factor = _BYTE_UNITS.get(unit.lower())
    if factor is None:
        meant = did_you_mean(unit.lower(), _BYTE_UNITS)
        raise ValueError(f"unknown unit {unit!r}; {meant}one of {', '.join(_BYTE_UNITS)}")
    num_bytes = number * factor  # exact for integers of any size
    if (isinstance(num_bytes, float) and not math.isfinite(num_bytes)) or num_bytes < 1:
        raise ValueError(f"an amount of memory must be positive and finite, got {quantity!r:.40}")
    return math.floor(num_bytes)


def format_bytes(num_bytes: int) -> str:
    """Bytes in decimal units with three significant digits.

    >>> format_bytes(1_234_567_890)
    '1.23 GB'
    """
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def format_us(time_us: float) -> str:
    """Microseconds, in the most readable unit.

    >>> format_us(12_340)
    '12.3 ms'
    """
    if time_us < 999.5:
        return f"{time_us:.3g} us"
    if time_us < 999_500:
        return f"{time_us / 1e3:.3g} ms"
    return f"{time_us / 1e6:.3g} s"
