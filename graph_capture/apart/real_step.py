"""From the calls of a real step to a cost graph.

Every call stays where it is, once. A memory that was there for longer than calls read it,
because something held it, is read by the last call that it was there at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..cost_graph import Category, CostGraph, Operator, Storage
from ..costs.allocator import block_bytes
from ..costs.cost_model import Call, CostModel, CostRecord, PreparedCostModel, TimingProgress
from ..costs.library_workspace import STORAGE_NAME, library_workspace_bytes
from ..costs.profile import ProfiledCosts
from ..costs.resolve import CostModelChoice, resolve_cost_model
from ..costs.roofline import LONGEST_TRIAL_NS, Roofline
from ..costs.target import Target
from ..costs.workspace import WorkspaceProbe
from ..folding.leaving import ACCUMULATE
from ..loop.loop_holds import LoopHolds
from ..loop.optimizer_step import OptimizerStep
from .real_calls import Memory, RealCall, RealCalls

AS_IT_IS = "it runs as it is"

_CATEGORIES: Mapping[str, Category] = {
    "parameter": "parameter",
    "buffer": "buffer",
    "input": "input",
    "gradient": "gradient",
    "constant": "buffer",
}


@dataclass(frozen=True, kw_only=True)
class RealStep:
    """A step that has run, as a cost graph.

    Parameters
    ----------
    graph
        Its operators and storages.
    calls
        What was written down.
    operators
        For each call the index of its operator.
    unwritten
        Memory that no later call has written to.
    costs
        Where the times come from.
    """

    graph: CostGraph
    calls: tuple[RealCall, ...]
    operators: tuple[int, ...]
    unwritten: frozenset[int]
    costs: CostRecord

    @property
    def standing(self) -> Mapping[tuple[int, str], int]:
        """The call that stands for a module's, by number and target."""
        return {(c.number, c.target): i for i, c in enumerate(self.calls) if c.number is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What memory is at the end of a step.

    Parameters
    ----------
    gradients, outputs
        Indices of memory that is gradients, and outputs or the loss.
    left
        Of memory that the model keeps, so that it is there in the next step, too.
    """

    gradients: frozenset[int]
    outputs: frozenset[int]
    left: frozenset[int]


def real_step(
    recorded: RealCalls,
    ending: Ending,
    *,
    target: Target,
    cost_model: CostModelChoice,
    optimizer: OptimizerStep | None,
    holds: LoopHolds,
    progress: TimingProgress | None = None,
) -> RealStep:
    """Price the calls of a real step, and make a cost graph of them.

    Parameters
    ----------
    recorded
        The step.
    ending
        What it leaves behind.
    target, cost_model, optimizer, holds, progress
        As for :func:`~.step_capture.capture_step`.
    """
    costs, roofline = resolve_cost_model(cost_model, target), Roofline(target.device)
    probe = WorkspaceProbe(
        target.torch_device,
        at_hand=target.at_hand,
        cache=costs.cache if isinstance(costs, ProfiledCosts) else None,
        too_long=lambda call: roofline.time_ns(call) > LONGEST_TRIAL_NS,
    )
    if isinstance(costs, PreparedCostModel):
        calls = [call.call for call in recorded.calls if call.call is not None]
        costs.prepare([*calls, *_calls_of(optimizer)], progress)
    making = _Making(recorded, ending, target, costs, probe)
    try:
        making.add_resident(optimizer, holds)
        making.add_calls()
        if optimizer is not None:
            making.add_optimizer(optimizer)
    finally:
        if isinstance(costs, PreparedCostModel):
            costs.save()
    record = costs.record()
    return RealStep(
        graph=CostGraph(tuple(making.operators), tuple(making.storages)),
        calls=tuple(recorded.calls),
        operators=tuple(making.places),
        unwritten=frozenset(k for k, m in enumerate(recorded.memory) if not m.writers),
        costs=replace(record, notes=(*record.notes, *probe.notes)),
    )


class _Making:
    """Puts the graph together."""

    def __init__(
        self,
        recorded: RealCalls,
        ending: Ending,
        target: Target,
        costs: CostModel,
        probe: WorkspaceProbe,
    ) -> None:
        self._recorded, self._ending, self._target = recorded, ending, target
        self._costs, self._probe = costs, probe
        self.operators: list[Operator] = []
        self.places: list[int] = []
        self.storages: list[Storage] = [
            Storage(
                name=memory.name,
                size_bytes=self._bytes_of(memory),
                producer=None,
                category=self._category(k, memory),
                kept=memory.role is None and memory.last is None,
            )
            for k, memory in enumerate(recorded.memory)
        ]

    def add_resident(self, optimizer: OptimizerStep | None, holds: LoopHolds) -> None:
        """Add what is there all the while, beside what calls have met."""
        left_bytes = sum(self.storages[k].size_bytes for k in self._ending.left)
        targets = (call.call.func for call in self._recorded.calls if call.call is not None)
        self._add("left in the model by the step before", left_bytes, "buffer")
        self._add("numbers that autograd saves", self._recorded.number_bytes, "buffer")
        self._add(STORAGE_NAME, library_workspace_bytes(targets, self._target.device), "buffer")
        if optimizer is not None:
            self._add("optimizer state", optimizer.state_bytes, "optimizer_state")
        self._add("held by the loop", holds.resident_bytes, "resident")

    def add_calls(self) -> None:
        """Add each call where it was, and what is held beside it."""
        held = self._held()
        for i, call in enumerate(self._recorded.calls):
            stands = call.number is not None
            self.places.append(len(self.operators))
            inputs = set(call.given) | (set() if stands else held.get(i, set()))
            for k in call.made:
                self.storages[k] = replace(self.storages[k], producer=len(self.operators))
            self.operators.append(
                Operator(
                    name=call.name,
                    target=self._target_of(call),
                    inputs=tuple(sorted(inputs - set(call.made))),
                    outputs=call.made,
                    cost_ns=0 if call.call is None else self._costs.time_ns(call.call),
                    workspace_bytes=self._scratch(call),
                    phase=call.phase,  # type: ignore[arg-type]
                    pinned=AS_IT_IS,
                    ordered=True,
                    module_path=call.module_path,
                    source=call.source,
                )
            )
            if stands and held.get(i):
                self._add_holding(i, call, held[i])

    def add_optimizer(self, optimizer: OptimizerStep) -> None:
        """Add the optimizer's step."""
        gradients = {k for k, s in enumerate(self.storages) if s.category == "gradient"}
        step_ns = sum(self._costs.time_ns(call) for call in _calls_of(optimizer))
        self.operators.append(
            Operator(
                name="optimizer",
                target=optimizer.name,
                inputs=tuple(sorted(gradients)),
                cost_ns=step_ns,
                workspace_bytes=optimizer.workspace_bytes,
                phase="optimizer",
                pinned="it belongs to the training loop",
                ordered=True,
            )
        )

    def _held(self) -> dict[int, set[int]]:
        """By the last call that memory was there at, what nobody reads so late."""
        read: dict[int, int] = {}
        for i, call in enumerate(self._recorded.calls):
            for k in (*call.given, *call.made):
                read[k] = i
        held: dict[int, set[int]] = {}
        for k, memory in enumerate(self._recorded.memory):
            if memory.role is None and memory.last is not None and memory.last > read[k]:
                held.setdefault(memory.last, set()).add(k)
        return held

    def _add_holding(self, i: int, call: RealCall, held: set[int]) -> None:
        """After a call that stands for others: what is held while they run."""
        self.operators.append(
            Operator(
                name=f"held_{i}",
                target="held",
                inputs=tuple(sorted(held)),
                phase=call.phase,  # type: ignore[arg-type]
                pinned=AS_IT_IS,
                ordered=True,
                module_path=call.module_path,
            )
        )

    def _target_of(self, call: RealCall) -> str:
        """What is called; autograd's adding to earlier gradients has a name of its own."""
        first = self._recorded.memory[call.given[0]] if call.given else None
        adds = first is not None and first.role == "gradient" and not call.made
        return ACCUMULATE if adds and call.phase == "backward" else call.target

    def _scratch(self, call: RealCall) -> int:
        if call.scratch_bytes is not None:
            return call.scratch_bytes
        return 0 if call.call is None else self._probe.bytes_of(call.call)

    def _bytes_of(self, memory: Memory) -> int:
        if memory.device_type != self._target.torch_type:
            return 0
        return block_bytes(memory.size_bytes, self._target.torch_type)

    def _category(self, k: int, memory: Memory) -> Category:
        if memory.role is not None:
            return _CATEGORIES[memory.role]
        if k in self._ending.gradients:
            return "gradient"
        if k in self._ending.outputs and memory.last is None:
            return "output"
        maker = self._recorded.calls[memory.maker].phase if memory.maker is not None else ""
        return "temporary" if maker == "backward" else "activation"

    def _add(self, name: str, num_bytes: int, category: Category) -> None:
        if num_bytes:
            self.storages.append(
                Storage(name=name, size_bytes=num_bytes, producer=None, category=category)
            )


def _calls_of(optimizer: OptimizerStep | None) -> Sequence[Call]:
    made: Sequence[tuple[Any, tuple, dict, Any]] = () if optimizer is None else optimizer.calls
    return [Call(func=func, args=args, kwargs=kwargs, out=out) for func, args, kwargs, out in made]
