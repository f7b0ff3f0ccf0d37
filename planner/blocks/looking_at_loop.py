"""See whether the loop around a model in blocks is as its plan counts, and say once if not.

A block's own plan knows nothing of the step's budget, so that one block looks for all.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from graph_capture.loop.fully_sharded import FullySharded
from graph_capture.loop.loop_holds import LoopHolds
from graph_capture.private_torch.modules import active_data_parallel
from graph_capture.private_torch.sharding import gathered_group_of, prefetches_of
from graph_capture.units import format_bytes

from ..plan_record import PlanRecord
from ..running.tally import Tally
from ..running.uncounted_buckets import output_bytes, uncounted_bytes


@dataclass(kw_only=True)
class LookAtLoop:
    """Looks at the block that is called first; all blocks of a model have the same one.

    Parameters
    ----------
    model
        Returns the model that the blocks are in, as long as it is there.
    holds
        What the plan counts that the loop holds, and how blocks are sharded.
    device_type
        Where the step runs.
    peak_bytes, budget_bytes
        The predicted peak, and what it may be.
    gradient_bytes, output_bytes
        Of the gradients that a step leaves, and of the model's outputs.
    """

    model: Callable[[], nn.Module | None]
    holds: LoopHolds
    device_type: str
    peak_bytes: int
    budget_bytes: int
    gradient_bytes: int
    output_bytes: int
    _tally: Tally = field(default_factory=Tally, repr=False, compare=False)
    _begun: bool = False

    @classmethod
    def of(cls, step: PlanRecord, model: nn.Module) -> LookAtLoop:
        """Return one for a plan of a step."""
        return cls(
            model=weakref.ref(model),
            holds=step.holds,
            device_type=step.device_type,
            peak_bytes=step.predicted_peak_bytes,
            budget_bytes=step.budget_bytes,
            gradient_bytes=sum(
                s.size_bytes for s in step.graph.storages if s.category == "gradient" and s.kept
            ),
            output_bytes=output_bytes(step),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> LookAtLoop:
        model, tally = self.model(), copy.deepcopy(self._tally, memo)
        return replace(self, model=_known(memo.get(id(model), model)), _tally=tally)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle keeps: of a block, not the whole model that it is in."""
        return {**self.__dict__, "model": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "model": _known(None)})

    def __call__(self, block: nn.Module, *, again: bool) -> bool:
        """Look at a block that is about to run by its plan; return whether to look again.

        Parameters
        ----------
        again
            Whether this block was looked at before.
        """
        if not again:
            if self._begun:
                return False
            self._begun = True
            self._look_at_shards(block)
            self._look_at_buckets()
        return self._look_at_gradients(block)

    def _look_at_shards(self, block: nn.Module) -> None:
        """Warn where a block is sharded otherwise than planned."""
        found, planned = FullySharded.found_on(block), self.holds.sharded
        if planned is not None and found is not None:
            adds = planned.no_sync or found.no_sync  # some micro-batch reduces in any case
            found = replace(found, reshard_root=self._reshards_root(planned), no_sync=adds)
            planned = planned.without_dtype(next(block.parameters()).dtype)
        other = self._counted_by_no_word(block, sharded=found is not None)
        if found == planned and other is None:
            return
        is_so = "not sharded by itself" if found is None else f"sharded as {found}"
        counts = "that it is not" if self.holds.sharded is None else str(self.holds.sharded)
        advice = (
            "shard each block with fully_shard, or plan without distributed="
            if found is None
            else f"plan with distributed='{found}'"
        )
        if other is not None:
            is_so, advice = other
        self._tally.say(
            "sharding",
            f"a planned {type(block).__name__} is {is_so}, and its plan counts {counts}: the peak "
            f"of this process is another than the predicted {format_bytes(self.peak_bytes)}, and "
            f"may be above the budget; {advice}",
        )

    def _look_at_buckets(self) -> None:
        """Warn where a ``DistributedDataParallel`` has gradients in memory of its own."""
        wrapper = active_data_parallel()
        if wrapper is None:
            return
        num_bytes = uncounted_bytes(wrapper, self.holds, self.device_type, self.output_bytes)
        if not num_bytes or self.peak_bytes + num_bytes <= self.budget_bytes:
            return
        peak = format_bytes(self.peak_bytes + num_bytes)
        self._tally.say(
            "buckets",
            f"{format_bytes(num_bytes)} of gradients lie in the buckets of a "
            f"DistributedDataParallel, which the plan does not count: its peak may be {peak}, the "
            f"budget is {format_bytes(self.budget_bytes)}. Plan in blocks with resident_bytes="
            f"{num_bytes}, which counts them",
        )

    def _reshards_root(self, planned: FullySharded) -> bool:
        """Whether the model's own group is resharded after forward; as planned without one."""
        model = self.model()
        group = None if model is None else gathered_group_of(model)
        return planned.reshard_root if group is None else group.post_forward_mesh_info is not None

    def _counted_by_no_word(self, block: nn.Module, *, sharded: bool) -> tuple[str, str] | None:
        """What no plan counts in how a block is sharded, and what to do; ``None`` for nothing."""
        group, model = gathered_group_of(block), self.model()
        if group is None:
            return None
        if type(group.offload_policy).__name__ == "CPUOffloadPolicy":
            return (
                "sharded with CPUOffloadPolicy, which keeps shards, gradients and the optimizer's "
                "state on the CPU",
                "no word counts that: leave offload_policy= out. Less than predicted is on the "
                "device, and copies of shards beside it",
            )
        if not sharded:
            return (
                "sharded among one process, which gathers copies",
                "leave fully_shard out where there is one process",
            )
        if len(group.fsdp_params) != len(list(block.parameters())):
            return (
                "sharded together with other parameters, or without some of its own",
                "call fully_shard once for each planned block",
            )
        ahead = sorted({name for b in self._blocks() for name in prefetches_of(b)})
        if ahead:
            return (
                f"in a model with {' and '.join(ahead)}, which gather more blocks ahead of time "
                "than are counted",
                "leave these calls out, or give the plan a budget that is lower by the gathered "
                "parameters of as many blocks",
            )
        inside = {id(p) for b in self._blocks() for p in b.parameters()}
        if model is None or gathered_group_of(model) is not None:
            return None
        if all(id(p) in inside for p in model.parameters()):
            return None
        return (
            "sharded, and what lies between the blocks is not",
            "call fully_shard on the model, too, after its blocks",
        )

    def _blocks(self) -> list[nn.Module]:
        model = self.model()
        modules = [] if model is None else list(model.modules())
        return [m for m in modules if gathered_group_of(m) is not None]

    def _look_at_gradients(self, block: nn.Module) -> bool:
        """Warn where gradients are there that the budget has no room for."""
        peak_bytes = self.peak_bytes + self.gradient_bytes
        if self.holds.accumulates or peak_bytes <= self.budget_bytes:
            return False
        group = gathered_group_of(block)
        parameters = (
            block.parameters()
            if group is None
            else (parameter.sharded_param for parameter in group.fsdp_params)
        )
        if all(p.grad is None for p in parameters):
            return True
        self._tally.say(
            "gradients held",
            f"{format_bytes(self.gradient_bytes)} of gradients are there when a planned step "
            f"begins, which the plan does not count: its peak may be {format_bytes(peak_bytes)}, "
            f"the budget is {format_bytes(self.budget_bytes)}. Call zero_grad(set_to_none=True) "
            "before forward, or plan with grads='accumulated', which counts them",
        )
        return False


def _known(model: nn.Module | None) -> Callable[[], nn.Module | None]:
    return _nothing if model is None else weakref.ref(model)


def _nothing() -> None:
    """Stand in for a weak reference to a model that is not known any more."""


__all__ = ["LookAtLoop"]
