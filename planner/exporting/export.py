"""Export a plan to a tool that checkpoints by layer or by call. Read this first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from graph_capture.printable import printable
from graph_capture.suggestions import unknown_name
from graph_capture.units import format_bytes, format_us
from solvers.strategies.blocks import Blocks

from ..base.budget import Budget
from ..plan_record import PlanRecord
from .choice import Judge, Setting
from .layers import (
    attention_cores,
    blocks_of,
    first_layers,
    groups,
    layer_names,
    none,
    outermost,
    subsets,
)
from .operator_policy import saving_calls
from .snippets import (
    for_deepspeed,
    for_lightning,
    for_megatron,
    for_selective,
    for_transformers,
)


class ExportTarget(StrEnum):
    """A tool that a plan can be exported to."""

    TRANSFORMERS = "transformers"
    LIGHTNING = "lightning"
    MEGATRON = "megatron"
    DEEPSPEED = "deepspeed"
    SELECTIVE = "selective"  # torch.utils.checkpoint.create_selective_checkpoint_contexts


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What comes nearest to a plan with another tool, and what it loses.

    Parameters
    ----------
    target
        The tool.
    layers
        All layers of the model, in forward order.
    checkpointed
        Those to be checkpointed.
    group_size
        How many consecutive ones are one checkpoint.
    attention_cores
        Whether only the attention cores run again, and no layer as a whole.
    saved_calls
        For :attr:`ExportTarget.SELECTIVE`, the calls whose outputs are saved.
    peak_bytes, step_us
        Of the step that way, by replay on the plan's own graph, and what eager takes
        beyond that graph where nothing is recomputed.
    plan_peak_bytes, plan_step_us, baseline_peak_bytes, baseline_step_us
        Of the plan, and of the step that recomputes nothing.
    budget_bytes, headroom_bytes
        Of the plan.
    fits
        Whether the peak is within the budget less the headroom.
    least_budget_bytes
        The least budget that this setting needs, headroom included; where ``fits`` is
        false no other setting that was tried needs less.
    num_settings
        How many settings were tried.
    code
        What to write.
    notes
        What the figures leave out.
    """

    target: ExportTarget
    layers: tuple[str, ...]
    checkpointed: tuple[str, ...]
    group_size: int
    attention_cores: bool
    saved_calls: tuple[str, ...]
    peak_bytes: int
    step_us: float
    plan_peak_bytes: int
    plan_step_us: float
    baseline_peak_bytes: int
    baseline_step_us: float
    budget_bytes: int
    headroom_bytes: int
    fits: bool
    least_budget_bytes: int
    num_settings: int
    code: str
    notes: tuple[str, ...] = ()

    @property
    def extra_time(self) -> float:
        """Time over the plan's step, as a fraction of it; negative where it takes less."""
        return self.step_us / self.plan_step_us - 1 if self.plan_step_us else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, texts and lists, ready for JSON."""
        lists = ("layers", "checkpointed", "saved_calls", "notes")
        return {
            **asdict(self),
            **{name: list(getattr(self, name)) for name in lists},
            "extra_time": self.extra_time,
        }

    def __str__(self) -> str:
        return "\n".join([*map(printable, self._words()), "", self.code])

    def _words(self) -> list[str]:
        budget = format_bytes(self.budget_bytes)
        headroom = f" less {format_bytes(self.headroom_bytes)}" if self.headroom_bytes else ""
        lines = [
            f"{self.target}: {self._what()}",
            f"  {'':<14}{'peak':>9}{'step':>10}",
            _row("without a plan", self.baseline_peak_bytes, self.baseline_step_us),
            _row("the plan", self.plan_peak_bytes, self.plan_step_us),
            _row("this export", self.peak_bytes, self.step_us)
            + f"   {self.extra_time:+.2%} over the plan",
        ]
        if self.fits:
            lines.append(
                f"  fits in {budget}{headroom}; the fastest of {self.num_settings} settings tried"
            )
        else:
            lines.append(
                f"  DOES NOT FIT in {budget}{headroom}: the lowest peak of {self.num_settings} "
                f"settings tried; it needs a budget of {format_bytes(self.least_budget_bytes)} "
                f"({self.least_budget_bytes} bytes)"
            )
        return lines + [f"  {note}" for note in self.notes]

    def _what(self) -> str:
        if self.attention_cores:
            return "recompute the attention core of every layer"
        if not self.checkpointed:
            return "checkpoint nothing"
        grouped = f" in groups of {self.group_size}" if self.group_size > 1 else ""
        saved = f", save the outputs of {len(self.saved_calls)} kinds of calls" * bool(
            self.saved_calls
        )
        return f"checkpoint {len(self.checkpointed)} of {len(self.layers)} layers{grouped}{saved}"


def export_plan(plan: PlanRecord, to: str) -> Export:
    """See :meth:`planner.Plan.export`."""
    if to not in set(ExportTarget):
        raise ValueError(unknown_name("tool", to, map(str, ExportTarget)))
    target = ExportTarget(to)
    blocks = blocks_of(plan.graph)
    stacks = [outermost(blocks)]
    if target in _ANY_MODULE and blocks != stacks[0]:
        stacks.append(blocks)
    judge = Judge(plan)
    chosen = judge.best_of(family for stack in stacks for family in _FAMILIES[target](judge, stack))
    setting = chosen.setting
    names = setting.stack or layer_names(stacks[0])
    return Export(
        target=target,
        layers=names,
        checkpointed=setting.layers,
        group_size=setting.group_size,
        attention_cores=setting.attention_cores,
        saved_calls=setting.saved_calls,
        peak_bytes=chosen.peak_bytes,
        step_us=chosen.step_us,
        plan_peak_bytes=plan.predicted_peak_bytes,
        plan_step_us=plan.predicted_step_us,
        baseline_peak_bytes=plan.baseline_peak_bytes,
        baseline_step_us=plan.baseline_step_us,
        budget_bytes=plan.budget_bytes,
        headroom_bytes=plan.headroom_bytes,
        fits=chosen.fits,
        least_budget_bytes=_budget_of(plan).total_for(chosen.peak_bytes),
        num_settings=judge.num_judged,
        code=_SNIPPETS[target](setting, names),
        notes=(*_NOTES.get(target, ()), _EAGER),
    )


def _budget_of(plan: PlanRecord) -> Budget:
    return Budget(total_bytes=plan.budget_bytes, headroom_bytes=plan.headroom_bytes)


def _by_layer(judge: Judge, blocks: Blocks) -> Iterable[Iterable[Setting]]:
    return subsets(judge.plan, blocks)


def _as_megatron(judge: Judge, blocks: Blocks) -> Iterable[Iterable[Setting]]:
    yield [none(judge.plan.graph)]
    yield attention_cores(judge.plan.graph)
    yield first_layers(judge.plan.graph, blocks)
    yield groups(judge.plan.graph, blocks, even=True)


def _as_pipeline(judge: Judge, blocks: Blocks) -> Iterable[Iterable[Setting]]:
    yield [none(judge.plan.graph)]
    yield groups(judge.plan.graph, blocks, even=False)


def _by_call(judge: Judge, blocks: Blocks) -> Iterable[Iterable[Setting]]:
    yield [none(judge.plan.graph)]
    for setting in saving_calls(judge, blocks):
        yield [setting]


_ANY_MODULE = (ExportTarget.LIGHTNING, ExportTarget.SELECTIVE)
"""Those that can be told to checkpoint whatever modules; the others know their layers."""

_FAMILIES: dict[ExportTarget, Callable[[Judge, Blocks], Iterable[Iterable[Setting]]]] = {
    ExportTarget.TRANSFORMERS: _by_layer,
    ExportTarget.LIGHTNING: _by_layer,
    ExportTarget.MEGATRON: _as_megatron,
    ExportTarget.DEEPSPEED: _as_pipeline,
    ExportTarget.SELECTIVE: _by_call,
}

_SNIPPETS: dict[ExportTarget, Callable[[Setting, Sequence[str]], str]] = {
    ExportTarget.TRANSFORMERS: for_transformers,
    ExportTarget.LIGHTNING: for_lightning,
    ExportTarget.MEGATRON: for_megatron,
    ExportTarget.DEEPSPEED: for_deepspeed,
    ExportTarget.SELECTIVE: for_selective,
}

_EAGER = (
    "peaks of eager steps are predicted within some 4%, not to the byte as a plan's own: leave a "
    "little of the budget, or measure the step"
)

_NOTES = {
    ExportTarget.TRANSFORMERS: ("for a model of Transformers; --to lightning takes any module",),
    ExportTarget.MEGATRON: (
        "figures are of the planned model on one device: flags count the layers of a pipeline "
        "stage, and Megatron's own layers are not this model's",
    ),
    ExportTarget.DEEPSPEED: (
        "figures are of the planned model on one device: PipelineModule also counts what is no "
        "layer; outside of it DeepSpeed checkpoints what the model asks for (--to transformers)",
    ),
}


def _row(name: str, peak_bytes: int, step_us: float) -> str:
    return f"  {name:<14}{format_bytes(peak_bytes):>9}{format_us(step_us):>10}"
