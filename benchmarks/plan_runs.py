"""Send jobs to workers in fresh processes, and record their results."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .plan_worker import Job, to_json
from .report import environment
from .run import ROOT

START_S = 180.0
"""Time that a worker may need besides solving: imports, building, capture, least memory."""


def run_job(job: Job) -> Iterator[dict[str, Any]]:
    """Yield results of a job as they come; if a worker fails or hangs, ``{"error": …}``."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.plan_worker"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit_s = (1 + len(job.budgets_bytes) + bool(job.frontier)) * (START_S + 1.5 * job.limit_s)
    alarm = threading.Timer(limit_s, child.kill)
    alarm.start()
    words: list[str] = []
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    listener = threading.Thread(target=words.extend, args=(child.stderr,), daemon=True)
    listener.start()
    try:
        child.stdin.write(to_json(job))
        child.stdin.close()
        for line in child.stdout:
            if line.startswith("{") and line.endswith("}\n"):
                yield json.loads(line)
        child.wait()
        listener.join()
        if child.returncode:
            last = words[-1].strip() if words else "it said nothing"
            yield {"error": f"worker ended with {child.returncode} (limit {limit_s:.0f} s): {last}"}
    finally:
        alarm.cancel()
        child.kill()
        child.wait()
        child.stdout.close()
        child.stderr.close()


def surveyed(job: Job) -> dict[str, Any]:
    """The result of a survey, or ``{"error": …}``."""
    results = list(run_job(job))
    return results[0]["survey"] if results and "survey" in results[0] else results[-1]


def frontier_from(job: Job) -> dict[str, Any]:
    """The plans at many budgets, or ``{"error": …}``."""
    results = list(run_job(job))
    return results[-1].get("frontier", results[-1])


def planned(job: Job) -> list[dict[str, Any]]:
    """A result for each budget; those after a failure are ``{"error": …}``."""
    results = [result.get("plan", result) for result in run_job(job) if "survey" not in result]
    missing = len(job.budgets_bytes) - len(results)
    return results + [{"error": "the worker failed before"}] * missing


def write_json(
    path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], module: str
) -> None:
    """Write rows, with the machine, the versions and the command of ``module``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    around = environment()
    around["command"] = shlex.join(["python", "-m", module, *sys.argv[1:]])
    around["versions"]["transformers"] = version("transformers")
    data = {"circumstances": around, "settings": settings, "rows": rows}
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def described(job: Job) -> dict[str, Any]:
    """The job without its budgets, as a part of a row."""
    row = asdict(job)
    del row["budgets_bytes"], row["survey"]
    return row


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; figures to the right, the first column to the left."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows]) + "\n"
