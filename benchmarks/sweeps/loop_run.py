"""Run one loop of the sweep on a planned model and on its twin: the same bits, or a warning.

A loop is drawn from a seed: a model, a policy, and a few changes with a step after each. Both
sides get the same changes and the same seeds. After each step, everything that the loop
can see is compared: losses, gradients, parameters, buffers and the generator.
"""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from graph_capture.costs.allocator import peak_extra_bytes
from planner import (
    CaptureError,
    InfeasibleBudgetError,
    Plan,
    PlanError,
    optimize,
)
from planner.planning import known_least

from ..testing.bitwise import assert_same_tensors
from .loop_models import MODELS
from .loop_moves import MOVES
from .loop_side import LoopSide, Unfit
from .loop_steps import STEPS
from .verdicts import BROKEN

POLICIES = ("error", "unplanned", "replan")
PART_OF_PEAK = 0.8
SOLVER_LIMIT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The contents of a loop.

    Parameters
    ----------
    model, policy
        Keys of ``MODELS`` and ``POLICIES``.
    acts
        Pairs of a move's name (``""`` for none) and a step's name.
    seed
        Of the data.
    """

    model: str
    policy: str
    acts: tuple[tuple[str, str], ...]
    seed: int = 0

    def __str__(self) -> str:
        acts = "; ".join(f"{move or '-'} / {step}" for move, step in self.acts)
        return f"{self.model}, {self.policy}: {acts}"


@dataclass(slots=True, kw_only=True)
class Verdict:
    """How a loop went.

    Parameters
    ----------
    verdict
        The worst of its steps, of ``verdicts.FINE`` and ``verdicts.BROKEN``.
    at
        The act that it concerns.
    words
        The error, the warning, or the first difference.
    over_budget, over_at, over_said
        Largest peak of a step as a share of the budget if it was above it, the step, and
        whether there had been a warning by then.
    """

    verdict: str = "equal"
    at: int = -1
    words: str = ""
    over_budget: float = 0.0
    over_at: str = ""
    over_said: bool = False


def drawn(seed: int) -> Loop:
    """The loop of a seed."""
    rng = random.Random(seed)
    model, policy = rng.choice(list(MODELS)), rng.choice(POLICIES)
    acts = []
    for _ in range(rng.randint(1, 4)):
        move = rng.choice(list(MOVES)) if rng.random() < 0.75 else ""
        step = rng.choice(list(STEPS)) if not move or rng.random() < 0.25 else "plain"
        acts.append((move, step))
    return Loop(model=model, policy=policy, acts=tuple(acts), seed=seed)


def singles(policies: Iterable[str] = POLICIES) -> list[Loop]:
    """Every model with every single move and every single step."""
    loops = []
    for model in MODELS:
        for policy in policies:
            loops += [Loop(model=model, policy=policy, acts=((move, "plain"),)) for move in MOVES]
            loops += [Loop(model=model, policy=policy, acts=(("", step),)) for step in STEPS]
    return loops


@cache
def plan_for(model: str) -> Plan:
    """A plan of the model, at worst at its least budget."""
    case = MODELS[model]
    torch.manual_seed(0)
    twin = case.make().train()
    known_least.LEAST_MEMORY_LIMIT_S = 1.0

    def planned(budget_bytes: int) -> Plan:
        return optimize(
            twin,
            case.sample(0, 8),
            budget_bytes=budget_bytes,
            loss_fn=case.loss,
            time_limit_s=SOLVER_LIMIT_S,
        )

    keep_all = planned(10**12).baseline_peak_bytes
    try:
        return planned(int(keep_all * PART_OF_PEAK))
    except InfeasibleBudgetError as error:
        return planned(error.min_budget_bytes)


def run_loop(loop: Loop) -> Verdict:
    """Run a loop until it ends or breaks the promise."""
    sides = [_side(loop, planned=planned) for planned in (False, True)]
    said: list[str] = []
    verdict = Verdict()
    for at, (move, step) in enumerate((("", "plain"), *loop.acts)):
        found = _act(sides, move, step, loop.seed + 7 * at + 1, said, verdict)
        if found == "unfit":
            continue
        if found != "equal" and verdict.verdict in ("equal", "said and equal"):
            verdict.verdict, verdict.at = found, at - 1
        if found not in ("equal", "said and equal", "said, other last bits", "eager's error"):
            break
    return verdict


_NO_TRAINING = ("no_grad", "inference_mode")
"""Steps that no plan runs and no budget covers."""


def _side(loop: Loop, *, planned: bool) -> LoopSide:
    case = MODELS[loop.model]
    torch.manual_seed(0)
    model = case.make().train()
    if planned:
        plan_for(loop.model).apply(model, on_shape_change=loop.policy)  # type: ignore[arg-type]
    return LoopSide(
        case=case, model=model, call=model, planned=planned, policy=loop.policy, loss=case.loss
    )


def _act(
    sides: list[LoopSide], move: str, step: str, seed: int, said: list[str], verdict: Verdict
) -> str:
    """Make one change and one step on both sides, and return the verdict."""
    outcomes = []
    for side in sides:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            over_before = verdict.over_budget
            outcome = _one(side, move, step, seed, verdict if side.planned else None)
        if side.planned:
            said += [str(w.message) for w in caught if _is_ours(w)]
            if verdict.over_budget > over_before:
                verdict.over_said = bool(said)
        outcomes.append(outcome)
    (expected, failed), (actual, broke) = outcomes
    if isinstance(failed, Unfit) or isinstance(broke, Unfit):
        return "unfit"
    if failed is not None:
        if broke is None:
            verdict.words = f"eager raises {_brief(failed)}, the planned step nothing"
            return "no error"
        if type(broke) is type(failed) or documented(broke):
            return "eager's error" if type(broke) is type(failed) else "error said"
        verdict.words = f"eager raises {_brief(failed)}, the planned step {_brief(broke)}"
        return "another error"
    if broke is not None:
        verdict.words = _brief(broke)
        return "error said" if documented(broke) else "crash"
    try:
        assert_same_tensors(expected, actual)
    except AssertionError as error:
        if any("last bits" in words for words in said) and _nearly(expected, actual):
            verdict.words = str(error)[:300]
            return "said, other last bits"
        verdict.words = str(error)[:300] + (
            f" (said: {said[-1][:120]})" if said else " (nothing said)"
        )
        return "other bits"
    ran_unplanned = _ran_unplanned(sides[1], step)
    if ran_unplanned and not said and sides[1].policy != "unplanned":
        verdict.words = "the step ran without the plan and nothing was said"
        return "silent"
    if said:
        verdict.words = said[-1][:300]
    return "said and equal" if said else "equal"


def _one(
    side: LoopSide, move: str, step: str, seed: int, verdict: Verdict | None
) -> tuple[dict[str, Any], BaseException | None]:
    seen: list[Any] = []

    def run() -> None:
        if move:
            MOVES[move](side)
        side.counts = _counts(side.model)
        optimizer = side.build_optimizer(
            [p for p in side.model.parameters() if p.requires_grad] or [nn.Parameter(torch.ones(1))]
        )
        side.optimizer = optimizer
        torch.manual_seed(seed)
        seen.extend(STEPS[step](side, optimizer, seed))

    try:
        if verdict is not None and not move and step not in _NO_TRAINING:
            _peak(side, run, step, verdict)
        else:
            run()
    except Exception as error:  # noqa: BLE001  # whatever comes out is what is judged
        return {}, error
    found: dict[str, Any] = {f"number {i}": value for i, value in enumerate(seen)}
    for name, p in side.model.named_parameters():
        found[f"parameter {name}"] = p
        found[f"gradient of {name}"] = p.grad
    found |= {f"buffer {name}": b for name, b in side.model.named_buffers()}
    found["the generator"] = torch.get_rng_state()
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in found.items()}, None


def _peak(side: LoopSide, run: Callable[[], None], step: str, verdict: Verdict) -> None:
    """Run while the allocator's reports are recorded; note a peak above the budget."""
    plan = plan_for(_name_of(side))
    gc.collect()
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*side.model.parameters(), *side.model.buffers())
    }
    errors: list[Exception] = []

    def recorded() -> None:
        for p in side.model.parameters():  # the record sees only frees of what it saw allocated
            p.grad = None if p.grad is None else p.grad.clone()
        try:
            run()
        except Exception as error:  # noqa: BLE001  # the record must end first
            errors.append(error)

    peak = sum(held.values()) + peak_extra_bytes(recorded)
    if errors:
        raise errors[0]
    assert side.optimizer is not None
    # The plans count no optimizer; a move may have chosen one that has state.
    state_bytes = sum(
        value.untyped_storage().nbytes()
        for state in side.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    part = (peak - state_bytes) / plan.budget_bytes
    if part > max(1.001, verdict.over_budget):
        verdict.over_budget, verdict.over_at = round(part, 3), step


def _nearly(expected: dict[str, Any], actual: dict[str, Any]) -> bool:
    """Whether numbers differ by no more than another order of summation explains."""
    return expected.keys() == actual.keys() and all(
        torch.allclose(actual[name], value, rtol=1e-5, atol=1e-7)
        for name, value in expected.items()
        if isinstance(value, Tensor)
    )


def _name_of(side: LoopSide) -> str:
    return next(name for name, case in MODELS.items() if case is side.case)


def documented(error: BaseException) -> bool:
    """Whether an error is one of the planner's, or names the plan."""
    return isinstance(error, (PlanError, CaptureError)) or (
        isinstance(error, RuntimeError) and "plan" in str(error).lower()
    )


def _is_ours(warning: warnings.WarningMessage) -> bool:
    import planner

    ours = getattr(planner, "PlanWarning", None)
    return ours is not None and issubclass(warning.category, ours)


def _counts(model: nn.Module) -> tuple[int, int] | None:
    """Planned and unplanned training steps so far, if the planner counts them."""
    import planner

    public = getattr(planner, "applied_plan", None)
    applied = None if public is None else public(model)
    if applied is None or not hasattr(applied, "planned_steps"):
        return None
    return applied.planned_steps, applied.unplanned_steps


_NO_TRAINING = (
    "no_grad",
    "inference_mode",
    "torch.func.grad",
    "forward-mode derivative",
    "trained in eval mode",
    "functional_call with other parameters",
)


def _ran_unplanned(side: LoopSide, step: str) -> bool:
    """Whether a training step did not increase the number of planned steps."""
    after = _counts(side.model)
    if side.counts is None or after is None or step in _NO_TRAINING:
        return False
    return after[0] == side.counts[0]


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:260]}"


def shrunk(loop: Loop, verdict: Verdict) -> tuple[Loop, Verdict]:
    """The fewest last acts of a broken loop that still break it in the same way."""
    acts = loop.acts[: verdict.at + 1]
    for begin in range(len(acts) - 1, -1, -1):
        shorter = Loop(model=loop.model, policy=loop.policy, acts=acts[begin:], seed=loop.seed)
        found = run_loop(shorter)
        if found.verdict == verdict.verdict:
            return shorter, found
    return loop, verdict


def record_of(loop: Loop) -> dict[str, Any]:
    """A loop and its verdict for one line of JSON; a broken loop is shrunk first."""
    torch.set_num_threads(1)
    verdict = run_loop(loop)
    kept = loop
    if verdict.verdict in BROKEN and len(loop.acts) > 1:
        kept, verdict = shrunk(loop, verdict)
    return {"outcome": verdict.verdict, "loop": asdict(kept), "text": str(kept), **asdict(verdict)}
