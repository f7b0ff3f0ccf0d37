"""See once, in the first planned call, whether a model is sharded as its plan counts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from graph_capture.fully_sharded import FullySharded
from graph_capture.units import format_bytes

from ..plan_record import PlanRecord
from ..running.tally import Tally


@dataclass(frozen=True, kw_only=True)
class LookAtShards:
    """Looks at the first block that is called; all blocks of a model have the same one.

    Parameters
    ----------
    planned
        How the plan counts that blocks are sharded; ``None`` for not at all.
    peak_bytes
        The predicted peak.
    """

    planned: FullySharded | None
    peak_bytes: int
    _tally: Tally = field(default_factory=Tally, repr=False, compare=False)

    @classmethod
    def of(cls, step: PlanRecord) -> LookAtShards:
        """Return one for a plan of a step."""
        return cls(planned=step.holds.sharded, peak_bytes=step.predicted_peak_bytes)

    def __call__(self, block: nn.Module) -> None:
        """Warn where a block that is called is sharded otherwise than planned."""
        found, planned = FullySharded.found_on(block), self.planned
        if planned is not None and found is not None:
            adds = planned.no_sync or found.no_sync  # some micro-batch reduces in any case
            found = replace(found, reshard_root=planned.reshard_root, no_sync=adds)
        if found == planned:
            return
        is_so = "not sharded by itself" if found is None else f"sharded as {found}"
        counts = "that it is not" if planned is None else str(planned)
        advice = (
            "shard each block with fully_shard, or plan without distributed="
            if found is None
            else f"plan with distributed='{found}'"
        )
        self._tally.say(
            "sharding",
            f"a planned {type(block).__name__} is {is_so}, and its plan counts {counts}: the peak "
            f"of this process is another than the predicted {format_bytes(self.peak_bytes)}, and "
            f"may be above the budget; {advice}",
        )


__all__ = ["LookAtShards"]
