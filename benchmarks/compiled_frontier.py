"""Both frontiers of compiled steps: ours and that of PyTorch's ratios, as rows and a figure.

``python -m benchmarks.compiled_frontier`` compiles two models without a budget, by four of
PyTorch's ratios, and by ours at the peaks that these come to; it writes one JSON file a model
into the folder, prints the rows as Markdown and draws the figure. ``--draw`` does the
last two from the files, and compiles nothing. Times are those of a quiet machine, or the title
says that they are not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.testing.zoo import ZOO
from planner.comparing.compiled_steps import CompiledRow, CompiledSteps, compare_compiled
from planner.plots import plot_compiled

BUSY = 0.3
"""Load for each CPU from which a machine that measures with one thread is busy: that thread
alone is a load of 1."""


def measure_model(name: str, options: argparse.Namespace) -> CompiledSteps:
    """Compile and run one model's steps."""
    case = ZOO[name](options.size)
    torch.manual_seed(0)
    model, sample = case.build(), case.sample(0)
    if getattr(model, "loss_type", "") is None:
        # Of GPT-2 Transformers knows none and says so in forward, which breaks its graph.
        model.loss_type = "ForCausalLM"

    def told(row: CompiledRow) -> None:
        sys.stderr.write(f"{name}: {row}\n")
        sys.stderr.flush()

    return compare_compiled(
        model,
        sample,
        ratios=options.ratios,
        loss_fn=case.loss_fn,
        lower=options.lower,
        repeats=options.repeats,
        seed=7,
        name=name,
        on_row=told,
    )


def title(found: list[CompiledSteps]) -> str:
    """What the figure shows, and on what."""
    about = found[0].about
    busy = any(s.about["load_average"] > 1 + BUSY * s.about["num_cpus"] for s in found)
    said = " of a busy machine: times are worth little" if busy else ""
    return (
        f"Compiled training steps, measured: float32, {found[0].lower} on the CPU, torch "
        f"{about['versions']['torch']},\n{about['num_threads']} thread{said}"
    )


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(ZOO), default=["bert", "llama"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.6, 0.3, 0.1])
    parser.add_argument("--lower", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--repeats", type=int, default=20, help="pairs of timed steps a row")
    parser.add_argument("--folder", type=Path, default=Path("docs/record/compiled"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/compiled_frontier.png"))
    parser.add_argument("--draw", action="store_true", help="from the files, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name in options.models:
        path = options.folder / f"{name}.json"
        if not options.draw:
            measure_model(name, options).save(path)
        found.append(CompiledSteps.load(path))
        sys.stdout.write(f"{found[-1]}\n\n")
        sys.stdout.flush()
    plot_compiled({s.name: s.points for s in found}, options.figure, title=title(found))
    sys.stdout.write(f"drawn {options.figure}\n")


if __name__ == "__main__":
    main()
