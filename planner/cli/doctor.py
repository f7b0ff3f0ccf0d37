"""The command that checks whether planning works on this machine: ``remat doctor``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import typer
from torch import nn

from graph_capture import capture
from graph_capture.costs.profile_cache import default_cache_dir
from graph_capture.units import format_bytes
from solvers import Schedule, replay, solve

from ..optimize import optimize
from ..plan import Plan
from ..versions import version_facts, version_lines
from .answers import Answer, AsJson, ExitCode, command

_WIDTH, _ROWS = 32, 256


@command
def doctor_command(as_json: AsJson = False) -> Answer:
    """Print versions, then try a small plan: what a bug report should say."""

    def say(line: str) -> None:  # at once: what comes next may end the process
        if not as_json:
            typer.echo(line)

    say("\n".join(version_lines()) + "\n")
    checks = []
    for name, check in CHECKS.items():
        passed, found = _checked(check)
        say(f"{'ok' if passed else 'FAILED':<8}{name}: {found}")
        checks.append({"name": name, "passed": passed, "found": found})
    broken = [str(check["name"]) for check in checks if not check["passed"]]
    failure = f"{len(broken)} of {len(CHECKS)} checks failed: {', '.join(broken)}"
    return Answer(
        text=None,
        data={"versions": version_facts(), "checks": checks},
        failure=failure if broken else "",
        code=ExitCode.NOT_AS_PROMISED if broken else ExitCode.DONE,
    )


def _checked(check: Callable[[], str]) -> tuple[bool, str]:
    """Run a check; whether it passed, and what it found."""
    try:
        return True, check()
    except Exception as error:  # noqa: BLE001  whatever breaks is what the report is about
        return False, f"{type(error).__name__}: {error}"


def _model() -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        layers = [m for _ in range(4) for m in (nn.Linear(_WIDTH, _WIDTH), nn.GELU())]
        return nn.Sequential(*layers), torch.randn(_ROWS, _WIDTH)


def _solves(solver: str) -> str:
    """Ask for a schedule of the small step at four fifths of its peak."""
    graph = capture(*_model(), loss_fn=torch.sum)
    peak_bytes = replay(graph, Schedule.keep_all(graph)).peak_bytes
    found = solve(graph, peak_bytes * 4 // 5, solver=solver, time_limit_s=5)
    if found.schedule is None:
        raise RuntimeError(f"{solver} found no schedule: {'; '.join(found.log) or found.status}")
    return f"{found.status} by {found.solver} in {found.solve_s:.1f} s"


def _check_solver() -> str:
    """HiGHS through highspy, and the compiled replay."""
    return _solves("slice_refinement")


def _check_reference_solver() -> str:
    """OR-tools in its child process."""
    return _solves("checkmate_lp_rounding")


def _check_planned_step() -> str:
    """Check that a planned step gives the same numbers as an unplanned one."""
    model, sample = _model()
    keep_all = optimize(model, sample, budget_gb=1000, loss_fn=torch.sum)
    plan = optimize(
        model, sample, budget_bytes=int(0.8 * keep_all.baseline_peak_bytes), loss_fn=torch.sum
    )
    without = _gradients(model, sample)
    by_plan = _gradients(_applied(plan, model), sample)
    if not all(map(torch.equal, without, by_plan)):
        raise RuntimeError("loss and gradients differ from those of the step without a plan")
    return (
        f"peak {format_bytes(plan.predicted_peak_bytes)} instead of "
        f"{format_bytes(plan.baseline_peak_bytes)}, loss and gradients equal"
    )


def _applied(plan: Plan, model: nn.Module) -> nn.Module:
    plan.apply(model)
    return model


def _gradients(model: nn.Module, sample: torch.Tensor) -> list[torch.Tensor]:
    """Return the loss and the gradients of one step."""
    model.zero_grad(set_to_none=True)
    loss = model(sample).sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _check_cache() -> str:
    """Where profiled times are kept."""
    folder = default_cache_dir()
    if folder is None:
        return "no home directory: profiled times are not kept"
    return f"profiled times are kept in {folder}"


CHECKS: dict[str, Callable[[], str]] = {
    "solver": _check_solver,
    "reference solver": _check_reference_solver,
    "planned step": _check_planned_step,
    "cache": _check_cache,
}
"""What is tried, by name: each says what it found, or raises."""
