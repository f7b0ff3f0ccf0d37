"""Keep Inductor from joining kernels where that takes more memory than a schedule has left.

Inductor joins kernels that read the same memory, also those of far apart moments: what one of
them reads then waits for the other, and what one makes is there long before its use. With
recomputation this undoes a schedule, since a value and its repetition read the same. So kernels
are joined only where the memory of all moments between them leaves room for what they touch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from graph_capture.private_torch.inductor_fusion import JoinOnce


@dataclass(frozen=True, kw_only=True)
class WithinMemory:
    """Runs may be joined while the memory between them stays within a limit.

    Parameters
    ----------
    memory_bytes
        Of each run of the schedule.
    limit_bytes
        The most that a joined kernel may bring it to; 0 joins nothing.
    """

    memory_bytes: Sequence[int]
    limit_bytes: int

    def for_one_lowering(self) -> JoinOnce:
        """A judge that adds what it allows to the memory of the moments between."""
        level = np.array(self.memory_bytes, dtype=np.int64)

        def may_join(runs: Collection[int], num_bytes: int) -> bool:
            between = level[min(runs) : max(runs) + 1]
            if between.max() + num_bytes > self.limit_bytes:
                return False
            between += num_bytes
            return True

        return may_join


__all__ = ["WithinMemory"]
