"""Every differentiable operator and module of PyTorch's own database, planned and run.

``make sweep-operators``, or ``python -m benchmarks.sweeps.operators``. Each case
is one operator or module between two layers, with contiguous and with other
inputs, planned at the least budget and half-way to the unplanned peak. Worker
processes judge them in turn; one that dies or hangs loses one case and is
restarted. Verdicts are written one per line as they come, and an interrupted sweep
continues where it stopped. The first samples of all operators come first, in a shuffled
order, so that the cases judged at any time are a fair sample.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import queue
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from select import select
from typing import Any

import torch

from .operator_cases import Case, all_cases
from .operator_judge import OUTCOMES, Verdict, judge

RECORD = Path("docs/sweeps/operators.md")
LONGEST_S = 240.0
_EXAMPLES = 6
_ANSWER = "verdict: "
_CASES_OF_A_WORKER = 400  # a longer-lived process would accumulate PyTorch's caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2, help="of each operator (2)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--layout", action="append", help="only this one (all)")
    parser.add_argument("--cases", type=Path, help="only those named in this file, one a line")
    parser.add_argument("--every", type=int, default=1, help="only every n-th case")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes (1)")
    parser.add_argument("--out", type=Path, default=Path("build/sweeps/operators.jsonl"))
    parser.add_argument("--resume", action="store_true", help="keep what is in --out already")
    parser.add_argument("--record", type=Path, default=None, help=f"write the table, {RECORD} say")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work()
        return
    cases = _chosen(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    verdicts = _read(options.out) if options.resume else []
    known = {v.case for v in verdicts}
    began = time.perf_counter()
    with options.out.open("a" if options.resume else "w", encoding="utf-8") as lines:
        for verdict in verdicts_of([c for c in cases if str(c) not in known], options.jobs):
            verdicts.append(verdict)
            lines.write(json.dumps(verdict.as_dict()) + "\n")
            lines.flush()
            if verdict.outcome not in ("green", "no case") or options.only:
                _say(f"{verdict.outcome:17} {verdict.case}: {verdict.why}")
    text = table(verdicts, options.samples, time.perf_counter() - began)
    if options.record is not None:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(text, encoding="utf-8")
    _say(text)


def _chosen(options: argparse.Namespace) -> list[Case]:
    cases = [c for c in all_cases(options.samples) if options.only in str(c)]
    cases = [c for c in cases if not options.layout or c.layout in options.layout]
    if options.cases is not None:
        named = set(options.cases.read_text(encoding="utf-8").splitlines())
        cases = [c for c in cases if str(c) in named]
    random.Random(0).shuffle(cases)
    return sorted(cases, key=lambda c: c.sample)[:: options.every]


def _read(path: Path) -> list[Verdict]:
    if not path.exists():
        return []
    return [Verdict(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def verdicts_of(cases: list[Case], num_jobs: int = 1) -> Iterator[Verdict]:
    """Judge cases in ``num_jobs`` processes; yield verdicts as they come."""
    todo: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        todo.put(case)
    done: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
    for _ in range(num_jobs):
        threading.Thread(target=_judge_in_a_worker, args=(todo, done), daemon=True).start()
    for _ in cases:
        yield done.get()


def _judge_in_a_worker(todo: queue.SimpleQueue[Case], done: queue.SimpleQueue[Verdict]) -> None:
    """Process a queue in a worker, which is restarted if a case ends it."""
    worker, num_judged = None, 0
    while True:
        try:
            case = todo.get_nowait()
        except queue.Empty:
            break
        if worker is None:
            worker, num_judged = _started(), 0
        answer = _asked(worker, case)
        num_judged += 1
        if answer is None:
            _ended(worker)
            why = f"the process ended or took over {LONGEST_S:.0f} s ({worker.returncode})"
            done.put(Verdict(case=str(case), outcome="crashed", why=why))
            worker = None
            continue
        done.put(Verdict(**answer))
        if num_judged == _CASES_OF_A_WORKER:
            _ended(worker)
            worker = None
    if worker is not None:
        _ended(worker)


def _ended(worker: subprocess.Popen[str]) -> None:
    if worker.poll() is None:
        worker.kill()
    worker.wait()


def _started() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.sweeps.operators", "--worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _asked(worker: subprocess.Popen[str], case: Case) -> dict[str, Any] | None:
    """The worker's verdict on a case; ``None`` if it dies or takes too long."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(asdict(case)) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return None
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        if not select([worker.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        line = worker.stdout.readline()
        if not line:
            return None
        if line.startswith(_ANSWER):
            return json.loads(line.removeprefix(_ANSWER))
    return None


def _work() -> None:
    torch.set_num_threads(1)
    all_cases(1)  # reads the databases
    gc.collect()
    gc.freeze()  # a peak is recorded after a collection, which need not scan all of PyTorch
    for line in sys.stdin:
        verdict = judge(Case(**json.loads(line)))
        _say(_ANSWER + json.dumps(verdict.as_dict()))


# -- the table of record ---------------------------------------------------------------------


def table(verdicts: list[Verdict], num_samples: int, took_s: float) -> str:
    """Counts by outcome and by class, with the cases behind them."""
    tried = [v for v in verdicts if v.outcome != "no case"]
    counts = Counter(v.outcome for v in tried)
    lines = [
        "# Operator sweep",
        "",
        "Every differentiable operator and module of PyTorch's own database (`op_db`, `module_db`) "
        "between two layers, float32 on the CPU, contiguous and other inputs, planned at the "
        "least budget and half-way to the unplanned peak. Written by `make sweep-operators`.",
        "",
        f"torch {torch.__version__}, {platform.machine()}, 1 thread, seed 1, at most "
        f"{num_samples} samples of each, {len(tried)} cases "
        f"of {len({v.case.split(' #')[0] for v in tried})} operators and modules, "
        f"{took_s / 60:.0f} minutes.",
        "",
        "| outcome | cases |",
        "| --- | ---: |",
        *(f"| {outcome} | {counts[outcome]} |" for outcome in OUTCOMES if outcome != "no case"),
        "",
        "| what is not green | class | cases | of which |",
        "| --- | --- | ---: | --- |",
    ]
    off = sorted(abs(v.unplanned_error) for v in tried if v.unplanned_error is not None)
    if off:
        lines.insert(
            lines.index("| what is not green | class | cases | of which |"),
            f"Unplanned peak off by more than 1 %: {sum(x > 0.01 for x in off)} of {len(off)} "
            f"cases, median {off[len(off) // 2]:.1%}, at most {off[-1]:.0%}.\n",
        )
    by_class: dict[tuple[str, str], list[str]] = {}
    for v in tried:
        if v.outcome != "green":
            why = v.why if v.outcome == "refused" else _coarse(v.why)
            by_class.setdefault((v.outcome, why), []).append(v.case)
    for (outcome, why), names in sorted(by_class.items(), key=lambda x: (x[0][0], -len(x[1]))):
        short = list(dict.fromkeys(n.split(" #")[0].removeprefix("operator ") for n in names))
        more = f", {len(short) - _EXAMPLES} more" if len(short) > _EXAMPLES else ""
        escaped = why.replace("|", "\\|")
        lines.append(
            f"| {outcome} | {escaped} | {len(names)} | {', '.join(short[:_EXAMPLES])}{more} |"
        )
    return "\n".join(lines) + "\n"


def _coarse(why: str) -> str:
    return why.split(",")[0].split(" of ")[0] if "bytes" not in why else "bytes"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
