"""Compiled steps within budgets, beside PyTorch's own budgets: gradients, peaks and times.

``python -m benchmarks.compiled`` measures ten budgets a model, from the least that is known to
work to the unbudgeted peak, and ten ratios of PyTorch's ``activation_memory_budget``. Models are
those of the tests (two layers, narrow), because CPU Inductor compiles slowly. Everything is
compared with ``torch.compile`` without a budget, from the same seed. Gradients are right that
have its bits, or are about as near as unbudgeted ones to those of the same step compiled in
float64. It ends with what is not as it must be: wrong gradients, a measured peak above the
budget or more than 2 % from the prediction, a plan that is slower than one of a lower budget.

``--json FILE`` keeps cells; a run goes on where the last one ended. ``--table`` prints them as
Markdown and measures nothing. ``--times`` measures times alone, in alternating pairs: of PyTorch's
ratios, of ours at the peaks that these reached, of ours at 85 and 70 % of the lowest of these, and
of ours without a limit; ``--figure FILE`` draws both frontiers of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.testing.zoo import ZOO

from .bench import Bench
from .cell import Cell, Cells, complaints
from .figure import draw_times
from .table import HEAD, TIMES_HEAD, gradients_text, table, times_table

MODELS = ("bert", "gpt2", "llama", "t5", "vit", "unet")
LOWER = ("inductor", "aot_eager")
MUCH_BYTES = 10**12
LESS = (0.85, 0.7)
"""Shares of PyTorch's lowest peak at which times are measured, too."""


def main() -> int:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(ZOO), default=list(MODELS))
    parser.add_argument("--cells", type=int, default=10, help="budgets and ratios a model")
    parser.add_argument("--only", choices=("ours", "theirs"), help="one of the two")
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--lower", choices=LOWER, default="inductor")
    parser.add_argument("--repeats", type=int, default=0, help="pairs of timed steps a cell")
    parser.add_argument("--json", type=Path, help="the file that keeps cells")
    parser.add_argument("--table", action="store_true", help="print the file, measure nothing")
    parser.add_argument("--times", action="store_true", help="times at PyTorch's peaks, alone")
    parser.add_argument("--figure", type=Path, help="where times are drawn")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 1000
    settings = {k: getattr(options, k) for k in ("size", "lower", "cells", "repeats")}
    cells = Cells(options.json, settings)
    if not options.table:
        for name in options.models:
            _measure_model(cells, name, options)
    if options.figure is not None:
        draw_times(cells, options.models, options.figure)
    return _finish(cells, options.models, times=options.times)


def _measure_model(cells: Cells, name: str, options: argparse.Namespace) -> None:
    parts = [i / max(1, options.cells - 1) for i in range(options.cells)]
    bench = Bench(name, options.size, options.lower, options.repeats or 10 * options.times)
    if options.times:
        _measure_times(cells, name, bench, parts)
        return
    if cells.get(name, "no budget") is None:
        _told(cells.add(bench.unbudgeted()))
        if options.lower == "inductor":
            _told(cells.add(bench.unfused()))
    for part in parts[::-1] if options.only != "ours" else ():
        if cells.get(name, f"PyTorch's {part:.3g}") is None:
            _told(cells.add(bench.theirs(part)))
    asked = [f"ours, {i} of {options.cells - 1}" for i in range(options.cells)]
    if options.only == "theirs" or all(cells.get(name, text) for text in asked):
        return
    least_bytes = bench.least_bytes()
    for part, text in zip(parts, asked):
        if cells.get(name, text) is None:
            budget_bytes = round(least_bytes + part * (bench.peak_bytes - least_bytes))
            _told(cells.add(bench.ours(budget_bytes, text)))


def _measure_times(cells: Cells, name: str, bench: Bench, parts: list[float]) -> None:
    _told(cells.add(bench.unbudgeted()))
    _told(cells.add(bench.ours(MUCH_BYTES, "ours, no limit", for_times=True)))
    lowest: Cell | None = None
    for part in parts[-2::-1]:  # a ratio of 1 is no budget
        theirs = cells.add(bench.theirs(part))
        _told(theirs)
        assert theirs.peak_bytes is not None
        asked = f"ours, at the peak of {part:.3g}"
        _told(cells.add(bench.ours(theirs.peak_bytes, asked, for_times=True)))
        if lowest is None or theirs.peak_bytes < (lowest.peak_bytes or 0):
            lowest = theirs
    if lowest is not None and lowest.peak_bytes is not None:
        for share in LESS:
            budget_bytes = round(share * lowest.peak_bytes)
            asked = f"ours, at {share:.0%} of their lowest"
            _told(cells.add(bench.ours(budget_bytes, asked, for_times=True)))


def _told(cell: Cell) -> None:
    figures = cell.failure or (
        f"{cell.peak_bytes:,} bytes"
        + (f" of {cell.budget_bytes:,}" if cell.budget_bytes else "")
        + (f", predicted {cell.predicted_bytes:,}" if cell.predicted_bytes else "")
        + f"; gradients {gradients_text(cell)}; first step {cell.first_step_s or 0:.0f} s"
        + (f", {cell.planning_s:.0f} s of them planning" if cell.planning_s else "")
        + (f"; time {cell.time_ratio:.2f}" if cell.time_ratio else "")
    )
    _say(f"{cell.model}, {cell.asked}: {figures}")


def _finish(cells: Cells, models: list[str], *, times: bool) -> int:
    said = []
    _say(f"\n{TIMES_HEAD if times else HEAD}")
    for name in models:
        found = [c for c in cells if c.model == name]
        plain = cells.get(name, "no budget")
        if plain is None or plain.peak_bytes is None:
            continue
        _say("\n".join(times_table(found) if times else table(found, plain.peak_bytes)))
        said += complaints(found)
    _say("\n" + ("\n".join(said) or "every cell of ours is as it must be"))
    return 1 if said else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
