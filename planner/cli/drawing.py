"""Figures of a plan, for ``remat show``."""

from __future__ import annotations

from pathlib import Path

from ..plan import Plan
from ..plots import plot_layers, plot_memory


def draw_plan(plan: Plan, folder: Path, name: str = "") -> list[Path]:
    """Write ``memory.png`` and ``layers.png``, creating the folder if necessary.

    Parameters
    ----------
    name
        Of the model, for the titles.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    OSError
        When a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{name}: " if name else ""
    memory, layers = folder / "memory.png", folder / "layers.png"
    plot_memory(plan, memory, title=f"{about}memory over one step")
    plot_layers(plan, layers, title=f"{about}what is saved, what is recomputed")
    return [memory, layers]
