"""The style of figures: colours, markers, lines and hatches; making and writing them.

Colours are Okabe and Ito's, which colour-blind people can tell apart (*Color Universal
Design*, 2008); markers, line styles and hatches say the same once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graph_capture.units import format_bytes

from ..base.atomic_write import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#999999"
YELLOW = "#F0E442"
COLOURS = (BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, BLACK, GREY)
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
PALE = "#E4E4E4"
"""Colour of areas of little interest."""
DARK = "#333333"

WIDTH_INCHES = 9.0
DPI = 150
"""1350 pixels, which a page shows at 900: a font of 9 points is then 12 pixels high."""
SUFFIXES = (".png", ".svg")

_RC = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "figure.titlesize": 11,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.handlelength": 3.0,  # as long as two dashes
    "svg.hashsalt": "remat-planner",  # ids of an SVG are otherwise drawn at random
    "svg.fonttype": "none",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Within this context, matplotlib draws in this project's style; outside nothing changes.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed; "
            'install the extra: pip install "remat-planner[plots]"'
        ) from error
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def check_matplotlib() -> None:
    """Refuse early if figures cannot be drawn.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    """
    with house_style():
        pass


def new_figure(height_inches: float) -> Figure:
    """An empty figure as wide as a page, without a window; call it inside :func:`house_style`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_INCHES, height_inches), dpi=100, layout="constrained")


def set_title(figure: Figure, title: str) -> None:
    """Put the title at the top left, where no legend is."""
    figure.suptitle(title, x=0.01, horizontalalignment="left")


def write_figure(figure: Figure, path: str | Path | None) -> None:
    """Write a figure as PNG or SVG, the same bytes each time; does nothing without a path.

    Raises
    ------
    ValueError
        When the suffix is another one.
    OSError
        When it cannot be written; an earlier file stays as it was.
    """
    if path is None:
        return
    path = Path(path)
    check_suffix(path)
    with house_style():
        drawn = _png(figure) if path.suffix.lower() == ".png" else _svg(figure)
    write_whole(path, drawn)


def _svg(figure: Figure) -> bytes:
    drawn = BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _png(figure: Figure) -> bytes:
    """A PNG with a palette of 256 colours, enough for these figures, at a third of the size."""
    from PIL import Image

    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(256)
        few.save(small, format="PNG", optimize=True, dpi=(DPI, DPI))
    return small.getvalue()


def check_suffix(path: str | Path | None) -> None:
    """Refuse a file that is neither PNG nor SVG before drawing anything.

    Raises
    ------
    ValueError
        Naming the suffix.
    """
    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"figures are written as {' or '.join(SUFFIXES)}, not as {Path(path).name!r}"
        )


def byte_unit(largest_bytes: float) -> tuple[float, str]:
    """Bytes a unit and its name, in which the largest figure of an axis reads well.

    >>> byte_unit(40e9), byte_unit(300e6)
    ((1000000000.0, 'GB'), (1000000.0, 'MB'))
    """
    for unit_bytes, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest_bytes >= 1.5 * unit_bytes:
            return unit_bytes, unit
    return 1.0, "B"


def time_unit(largest_us: float) -> tuple[float, str]:
    """Microseconds a unit and its name, likewise."""
    for unit_us, unit in ((1e6, "s"), (1e3, "ms")):
        if largest_us >= 1.5 * unit_us:
            return unit_us, unit
    return 1.0, "us"


def shown_bytes(num_bytes: int) -> str:
    """Bytes for a label; a line is not broken before the unit."""
    return format_bytes(num_bytes).replace(" ", "\u00a0")


def draw_grid(axis: Any, which: str = "both") -> None:
    """A pale grid behind everything."""
    axis.set_axisbelow(True)
    axis.grid(axis=which)
