from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from planner.plots import style

from .made import whole_comparison


@pytest.mark.slow
def test_importing_the_planner_loads_no_matplotlib() -> None:
    """Neither the planner nor its figures need the extra before something is drawn."""
    code = "import sys, planner, planner.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who draws without it learns what to install."""
    from planner.plots import plot_pareto

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "remat-planner\[plots\]"'):
        plot_pareto(whole_comparison())


def test_style_is_left_behind() -> None:
    """Drawing changes nothing of matplotlib's settings, and opens no window's figure."""
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    with style.house_style():
        assert mpl.rcParams["font.size"] == 9.5
    assert dict(mpl.rcParams) == before


def test_fonts_are_legible_and_backgrounds_light() -> None:
    """Nothing below nine points, on white."""
    sizes = [v for k, v in style._RC.items() if k.endswith(("size",))]
    assert min(sizes) >= 9
    assert style._RC["figure.facecolor"] == "white"


@pytest.mark.parametrize("suffix", style.SUFFIXES)
def test_a_figure_is_written_whole_or_not_at_all(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where writing fails at its end, the figure of before is still there and nothing else."""
    with style.house_style():
        figure = style.new_figure(1.0)
    path = tmp_path / f"figure{suffix}"
    style.write_figure(figure, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("planner.base.atomic_write.os.fsync", full)
    figure.text(0.5, 0.5, "more")
    with pytest.raises(OSError, match="no space left"):
        style.write_figure(figure, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
