"""Figures of comparisons and plans.

Drawing needs matplotlib (the extra ``plots``); importing does not.

Every function returns the figure, and writes it if a path ending in ``.png`` or
``.svg`` is given. Figures belong to no window and to no global state of matplotlib, so
nothing has to be closed.
"""

from .compiled_frontier import plot_compiled
from .growth import plot_growth
from .layers import plot_layers
from .memory import plot_memory
from .pareto import plot_pareto
from .predicted import plot_predicted

__all__ = [
    "plot_compiled",
    "plot_growth",
    "plot_layers",
    "plot_memory",
    "plot_pareto",
    "plot_predicted",
]
