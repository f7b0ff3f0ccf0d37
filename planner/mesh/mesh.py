"""The axes of a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

DataParallelKind = Literal["ddp", "fsdp2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """How many ranks each axis has.

    Parameters
    ----------
    dp
        Data parallel: each has its own batch.
    tp
        Tensor parallel: they divide matrices and what these make.
    pp
        Pipeline: they divide the layers.

    Raises
    ------
    ValueError
        When one is no whole number from 1 on.

    Examples
    --------
    >>> mesh = Mesh.of({"dp": 64, "tp": 8, "pp": 4})
    >>> mesh.num_ranks, str(mesh)
    (2048, 'dp 64 × tp 8 × pp 4')
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for axis in fields(self):
            ranks = getattr(self, axis.name)
            if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
                raise ValueError(f"axis {axis.name!r} has a whole number of ranks, got {ranks!r}")

    @classmethod
    def of(cls, axes: Mapping[str, Any] | Mesh) -> Mesh:
        """Read the axes as users write them."""
        if isinstance(axes, Mesh):
            return axes
        if not isinstance(axes, Mapping):
            raise ValueError(f"mesh is such as {{'dp': 64, 'tp': 8, 'pp': 4}}, got {axes!r:.100}")
        known = [axis.name for axis in fields(cls)]
        unknown = next((name for name in axes if name not in known), None)
        if unknown is not None:
            raise ValueError(
                f"the axes that are estimated are {', '.join(known)}, not {unknown!r:.50}: experts "
                "and sequences that are divided among ranks are not"
            )
        return cls(**axes)

    @property
    def num_ranks(self) -> int:
        """Of all axes together."""
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        return f"dp {self.dp} × tp {self.tp} × pp {self.pp}"
