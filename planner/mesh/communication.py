"""What a rank sends in a step, and how much of it no computation hides.

Rings: an all-reduce of ``b`` bytes among ``n`` ranks sends ``2 (n - 1) / n · b`` from each,
an all-gather or a reduce-scatter half of that (Thakur et al. 2005, DOI 10.1177/1094342005051521).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Axis = Literal["dp", "tp", "pp"]
AXES: tuple[Axis, ...] = ("dp", "tp", "pp")

RANKS_OF_A_NODE = 8
"""Of the machines below: so many ranks are connected by the faster links."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What one rank can send per second, in one direction.

    Parameters
    ----------
    inside_bytes_per_s, outside_bytes_per_s
        To ranks of the same machine, and of others.
    source
        Where the figures come from.
    """

    inside_bytes_per_s: float
    outside_bytes_per_s: float
    source: str


LINKS: Mapping[str, Links] = {
    "h100": Links(
        inside_bytes_per_s=450e9,
        outside_bytes_per_s=50e9,
        source="NVIDIA DGX H100 data sheet: NVLink 900 GB/s both ways, 400 Gb/s network per GPU",
    ),
    "a100": Links(
        inside_bytes_per_s=300e9,
        outside_bytes_per_s=25e9,
        source="NVIDIA DGX A100 data sheet: NVLink 600 GB/s both ways, 200 Gb/s network per GPU",
    ),
}
"""By name of the device."""


def rates(device: str, tp: int, given: Mapping[str, float] | None) -> tuple[dict[Axis, float], str]:
    """Return bytes per second for each axis that has a rate, and where they come from.

    Parameters
    ----------
    given
        In GB/s for each axis; they come before the table's.

    Raises
    ------
    ValueError
        When one is no axis, or no rate.

    Examples
    --------
    >>> rates("h100", 8, {"dp": 25})[0]
    {'dp': 25000000000.0, 'tp': 450000000000.0, 'pp': 50000000000.0}
    """
    known: dict[Axis, float] = {}
    sources = []
    links = LINKS.get(device)
    if links is not None:
        inside = links.inside_bytes_per_s if tp <= RANKS_OF_A_NODE else links.outside_bytes_per_s
        known = {"dp": links.outside_bytes_per_s, "tp": inside, "pp": links.outside_bytes_per_s}
        sources.append(links.source)
    for axis, gb_per_s in (given or {}).items():
        if axis not in AXES:
            raise ValueError(f"bandwidth_gb_per_s is by axis, one of {AXES}, got {axis!r:.50}")
        if isinstance(gb_per_s, bool) or not gb_per_s > 0:
            raise ValueError(f"the bandwidth of {axis!r} is in GB/s and above 0, got {gb_per_s!r}")
        known[axis] = gb_per_s * 1e9
    if given:
        sources.insert(0, f"as given for {', '.join(given)}")
    return known, "; ".join(sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one rank sends in a step for one purpose.

    Parameters
    ----------
    axis
        Among which ranks.
    what
        In words.
    is_forward
        Whether it belongs to the forward pass.
    count
        How many collectives or messages.
    sent_bytes
        By this rank, in all of them.
    time_us
        At the rate of the axis; ``None`` where that is not known.
    exposed_us
        Of it, what no computation hides.
    """

    axis: Axis
    what: str
    is_forward: bool
    count: int
    sent_bytes: int
    time_us: float | None
    exposed_us: float | None


def all_reduced(num_bytes: int, ranks: int) -> int:
    """Return the bytes that each rank of a ring sends for the sum of a tensor.

    >>> all_reduced(800, 4)
    1200
    """
    return 2 * gathered(num_bytes, ranks)


def gathered(num_bytes: int, ranks: int) -> int:
    """Return the bytes that each rank sends so that all have the whole tensor; or its sum's parts.

    >>> gathered(800, 4)
    600
    """
    return num_bytes * (ranks - 1) // ranks


def traffic(
    axis: Axis,
    what: str,
    *,
    count: int,
    sent_bytes: int,
    rate: float | None,
    hidden_us: float = 0.0,
    is_forward: bool = False,
) -> Traffic:
    """Return the traffic with its times.

    Parameters
    ----------
    hidden_us
        How long computation goes on beside it.
    """
    time_us = None if rate is None else sent_bytes / rate * 1e6
    return Traffic(
        axis=axis,
        what=what,
        is_forward=is_forward,
        count=count,
        sent_bytes=sent_bytes,
        time_us=time_us,
        exposed_us=None if time_us is None else max(0.0, time_us - hidden_us),
    )
