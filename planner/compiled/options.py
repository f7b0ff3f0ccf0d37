"""The options of a compiled step, as users write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import NoneType
from typing import Any, Literal, get_args

from graph_capture.loop.loop_holds import Grads, LoopHolds, Outputs

from ..base.budget import parse_budget, parse_headroom
from ..base.solve_options import SolveOptions
from .code_name import code_name
from .compiled_plan import CompiledPlan

Lower = Literal["inductor", "aot_eager"]

_SOLVING = ("time_limit_s", "gap", "seed", "workers")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledOptions:
    """What a compiled step is planned for.

    Parameters
    ----------
    budget_bytes
        The most that forward and backward may hold, resident tensors included.
    headroom
        Part of it that stays free, as of :func:`planner.optimize`.
    lower
        What the two graphs are compiled with: ``"inductor"``, or ``"aot_eager"``, eager
        PyTorch's own kernels.
    resident_bytes
        What the caller has on the device that the graph does not take: optimizer state,
        parameters that it does not use.
    later_bytes
        What graphs after a graph break hold while an earlier one runs: their parameters,
        gradients and results. Counted in the plans of graphs without a loss.
    calls
        How many calls of graphs wait for their backward passes in a step: the number of layers
        where each is compiled by itself.
    outputs
        ``"held"``: the caller has the results of a graph until the step ends. ``"released"``: of
        them only the loss, once forward has ended.
    grads
        ``"accumulated"``: parameters have gradients when forward begins, to which those of
        this step are added. ``"none"``: they have none.
    on_plan
        Is told each plan, once it is made.
    rounds
        How many generated codes are read at most to find a plan whose code fits; with each more
        there are twice as many levels of memory to solve for.
    solving
        How hard to search for a schedule.
    """

    budget_bytes: int
    headroom: float | str | None = None
    lower: Lower = "inductor"
    resident_bytes: int = 0
    later_bytes: int = 0
    calls: int = 1
    outputs: Outputs = "held"
    grads: Grads = "none"
    on_plan: Callable[[CompiledPlan], Any] | None = None
    rounds: int = 5
    solving: SolveOptions = field(default_factory=lambda: SolveOptions(time_limit_s=10.0))

    @property
    def name(self) -> str:
        """What a plan depends on besides the graph, for caches of compiled code."""
        return f"remat-planner {code_name()}: {replace(self, on_plan=None)}"

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> CompiledOptions:
        """Read the options of ``torch.compile(model, backend="remat", options={…})``.

        Raises
        ------
        ValueError
            When one is unknown or out of range, or the budget is not given once.

        Examples
        --------
        >>> CompiledOptions.of({"budget_gb": 40, "lower": "aot_eager"}).budget_bytes
        40000000000
        """
        if not isinstance(given, (Mapping, NoneType)):
            raise ValueError(f"options is a dictionary, {{'budget_gb': 40}}, got {given!r:.100}")
        given = dict(given or {})
        own = [f.name for f in fields(cls) if f.name not in ("budget_bytes", "solving")]
        known = ("budget_gb", "budget_bytes", *own, *_SOLVING)
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(
                f"backend 'remat' has no option {unknown[0]!r}; there are {', '.join(known)}"
            )
        budget_bytes = parse_budget(given.get("budget_gb"), given.get("budget_bytes"))
        parse_headroom(given.get("headroom"), budget_bytes, "cpu")  # refuses invalid ones at once
        lower = given.get("lower", "inductor")
        if lower not in get_args(Lower):
            raise ValueError(
                f"lower is {', '.join(map(repr, get_args(Lower)))}, got {lower!r:.100}"
            )
        on_plan = given.get("on_plan")
        if on_plan is not None and not callable(on_plan):
            raise ValueError(f"on_plan is a function of a plan, got {on_plan!r:.100}")
        rounds, calls = given.get("rounds", 5), given.get("calls", 1)
        for name, number in (("rounds", rounds), ("calls", calls)):
            if type(number) is not int or number < 1:
                raise ValueError(f"{name} is a number from 1, got {number!r:.100}")
        holds = LoopHolds.of(
            given.get("outputs", "held"), given.get("grads", "none"), given.get("resident_bytes", 0)
        )
        if holds.consumes:
            raise ValueError(
                "grads is 'none' or 'accumulated' for compiled steps, got 'consumed': compiled "
                "backward hands all gradients over at its end, so that nothing is freed before"
            )
        later_bytes = _later_bytes(given.get("later_bytes", 0))
        solving = {"time_limit_s": 10.0, **{k: given[k] for k in _SOLVING if k in given}}
        return cls(
            budget_bytes=budget_bytes,
            headroom=given.get("headroom"),
            lower=lower,
            resident_bytes=holds.resident_bytes,
            later_bytes=later_bytes,
            calls=calls,
            outputs=holds.outputs,
            grads=holds.grads,
            on_plan=on_plan,
            rounds=rounds,
            solving=SolveOptions(**solving),
        )


def _later_bytes(given: Any) -> int:
    try:
        return LoopHolds.of("held", "none", given).resident_bytes
    except ValueError as error:
        raise ValueError(str(error).replace("resident_bytes", "later_bytes")) from None


__all__ = ["CompiledOptions", "Lower"]
