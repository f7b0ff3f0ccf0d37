"""The model sweep: plan every architecture at hand, and compare each planned step with eager's.

``python -m benchmarks.sweeps.models --help``. See :mod:`benchmarks.sweeps.model_run` for
what is checked, :mod:`benchmarks.sweeps.transformers_models` and
:mod:`benchmarks.sweeps.other_models` for where models come from.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from .isolated import Limits, read_records, run_all
from .model_table import model_table

OUT = Path("build/sweeps/models.jsonl")
TABLE = Path("docs/sweeps/models.md")


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not options.table_only:
        _import_what_all_need()
        names = [n for n in all_names(options.seed) if fnmatch(n, options.only)][: options.count]
        cases = [(name, partial(run_named, name)) for name in names]
        limits = Limits(time_s=options.model_limit_s)
        for record in run_all(cases, options.out, limits, limit_s=options.limit_s):
            say(f"{record['name']:48} {record['outcome']:12} {record.get('error', '')[:150]}")
    records = read_records(options.out)
    table = model_table(records)
    say("\n".join(table.splitlines()[:14]))
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(table, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="a pattern of names, e.g. 'transformers/q*'")
    parser.add_argument("--count", type=int, help="so many of them")
    parser.add_argument("--seed", type=int, default=0, help="of their order")
    parser.add_argument("--limit-s", type=float, default=2100.0, help="of the whole sweep")
    parser.add_argument("--model-limit-s", type=float, default=90.0, help="of one model")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines; a sweep goes on there")
    parser.add_argument("--table", type=Path, help=f"where to write the table, e.g. {TABLE}")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    return parser


def all_names(seed: int = 0) -> list[str]:
    """Every subject, in a seeded order, so that an incomplete sweep is a fair sample."""
    from . import other_models, transformers_models

    others = [*other_models.SUBJECTS]
    families = [f"transformers/{family}" for family in transformers_models.families()]
    random.Random(seed).shuffle(families)
    return others + families


def find(name: str) -> Any:
    """The subject of a name."""
    from . import other_models, transformers_models

    group, _, rest = name.partition("/")
    if group == "transformers":
        return transformers_models.subject(rest)
    return other_models.SUBJECTS[name]()


def run_named(name: str) -> dict[str, Any]:
    """A subject's record."""
    from .model_run import run_subject

    warnings.simplefilter("ignore")
    call: Callable[[], Any] = partial(find, name)
    return run_subject(call)


def _import_what_all_need() -> None:
    """Import and compile, once and before any fork, what takes seconds."""
    import torch

    torch.set_num_threads(1)
    import transformers
    import transformers.generation
    import transformers.modeling_utils
    import transformers.models.llama.modeling_llama

    transformers.logging.set_verbosity_error()
    from benchmarks.instances import chain
    from benchmarks.worker import COMPILED
    from solvers.instances import budget_of
    from solvers.least_memory import least_memory
    from solvers.portfolio import solve
    from solvers.uniform import uniform_under_budget

    from . import model_run  # noqa: F401

    small = chain(8, seed=0)
    for solver in COMPILED:
        solve(small, budget_of(small, 0.6), solver=solver, time_limit_s=1.0)
    least_memory(small, time_limit_s=1.0, seed=0)
    uniform_under_budget(small, budget_of(small, 0.6))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
