"""Plans for several calls of one model: with labels and without, in fp32 and under autocast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from graph_capture.loop.loss import LossFn

from .errors import PlanError
from .plan import Plan, compiler_for, replans_with
from .plan_record import OnShapeChange
from .running.attach import applied_plan, apply_plan
from .running.same_plan import applied_everywhere
from .saving.serialize import load_plans, save_plans


@dataclass(frozen=True)
class PlanSet(Sequence[Plan]):
    """Several plans of one model, applied and saved together.

    Each training call runs by the plan that was made for it. The budgets are those of the
    plans; steps come one after the other, so they do not add up.

    Parameters
    ----------
    plans
        The first is the one that error messages compare other calls with.

    Raises
    ------
    ValueError
        When there is none, or one is in blocks.

    Examples
    --------
    >>> import torch
    >>> from planner import optimize
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> plan = optimize(net, torch.randn(64, 8), budget_gb="1MB")
    >>> plans = PlanSet((plan, plan.for_call(net, torch.randn(64, 8, requires_grad=True))))
    >>> planned = plans.apply(net)
    """

    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "plans", tuple(self.plans))
        if not self.plans:
            raise ValueError("a set of plans needs at least one")
        for plan in self.plans:
            if type(plan) is not Plan:
                raise ValueError(
                    f"a set holds plans of whole steps, and this is a {type(plan).__name__}: make "
                    "each with optimize(…, granularity='step'), or apply a plan in blocks alone"
                )

    @classmethod
    def of(cls, model: nn.Module) -> PlanSet:
        """Return the plans that a planned model has: the applied one and those made since.

        Raises
        ------
        PlanError
            When no plan is applied to it.
        """
        applied = applied_plan(model)
        if applied is None:
            raise PlanError(f"no plan is applied to this {type(model).__name__}")
        return cls(tuple(map(Plan.of, (applied.plan, *applied.other_plans))))

    def apply(
        self,
        model: nn.Module,
        *,
        on_shape_change: OnShapeChange = "error",
        loss_fn: LossFn | None = None,
        compile: bool = False,
    ) -> nn.Module:
        """Make ``model`` train by these plans; returns the same object.

        See :meth:`planner.Plan.apply` for the arguments and errors; nothing is applied when
        one of the plans does not fit the model. :meth:`planner.Plan.remove` takes all away.
        """
        first, *others = self.plans
        with applied_everywhere(model):
            apply_plan(
                first,
                first._live,
                model,
                on_shape_change,
                replans_with(loss_fn),
                [(plan, plan._live) for plan in others],
                compiler=compiler_for(first) if compile else None,
            )
        return model

    def save(self, path: str | Path) -> None:
        """Write the plans as one JSON file, whole or not at all."""
        save_plans(self.plans, Path(path))

    @staticmethod
    def load(path: str | Path) -> PlanSet:
        """Read what :meth:`save` or :meth:`planner.Plan.save` wrote.

        Raises
        ------
        PlanError
            When the file is not such a file, or is damaged.
        """
        return PlanSet(tuple(map(Plan.of, load_plans(Path(path)))))

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.plans[index]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def __str__(self) -> str:
        return "\n".join(map(str, self.plans))
