"""The loop sweep: change something between steps, and check that a plan keeps its promise.

``python -m benchmarks.sweeps.loops --help``. See :mod:`benchmarks.sweeps.loop_run` for what is
judged, :mod:`benchmarks.sweeps.loop_moves` and :mod:`benchmarks.sweeps.loop_steps` for what
loops do.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from .isolated import Limits, read_records, run_all
from .loop_table import loop_table
from .verdicts import FINE

OUT = Path("build/sweeps/loops.jsonl")
TABLE = Path("docs/sweeps/loops.md")


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not options.table_only:
        _run(options)
    table = loop_table(read_records(options.out))
    say(table)
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(table, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loops", type=int, default=300, help="how many are drawn")
    parser.add_argument("--first-seed", type=int, default=0, help="of the drawn ones")
    parser.add_argument("--seed", type=int, help="run the loop of this seed only, and say all")
    parser.add_argument(
        "--singles", action="store_true", help="each single change and step instead, all policies"
    )
    parser.add_argument("--policy", help="of the single ones: error, unplanned or replan")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="of the whole sweep")
    parser.add_argument("--loop-limit-s", type=float, default=60.0, help="of one loop")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines; a sweep goes on there")
    parser.add_argument("--table", type=Path, help=f"where to write the table, e.g. {TABLE}")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    return parser


def _run(options: argparse.Namespace) -> None:
    prepare()
    from .loop_run import POLICIES, drawn, record_of, singles

    if options.seed is not None:
        say(str(record_of(drawn(options.seed))))
        return
    if options.singles:
        chosen = singles((options.policy,) if options.policy else POLICIES)
        cases = [(f"single: {loop}", partial(record_of, loop)) for loop in chosen]
    else:
        seeds = range(options.first_seed, options.first_seed + options.loops)
        cases = [(f"seed {seed}", partial(record_of, drawn(seed))) for seed in seeds]
    limits = Limits(time_s=options.loop_limit_s)
    for record in run_all(cases, options.out, limits, limit_s=options.limit_s):
        if record["outcome"] not in FINE:
            what = record.get("text", record["name"])
            words = record.get("words") or record.get("error", "")
            say(f"{record['outcome']:12} {what}\n             {words[:200]}")


def prepare() -> None:
    """Import, compile and plan what every loop needs, before any fork."""
    import torch

    torch.set_num_threads(1)
    from .loop_models import MODELS
    from .loop_run import plan_for

    for name in MODELS:
        plan_for(name)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
