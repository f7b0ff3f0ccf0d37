"""Keep Inductor from joining kernels where that takes more memory than a schedule has left.

Inductor joins kernels that read the same memory, also those of far apart moments: what one of
them reads then waits for the other, and what one makes is there long before its use. With
recomputation this undoes a schedule, since a value and its repetition read the same. So kernels
are joined only where the memory of all moments between them leaves room for what they touch.

On the CPU, it also writes kernels that follow each other into one function. All of their results
are there before it is called, and what they read last is freed after it. So a kernel begins a
function of its own where the function's memory would exceed the peak of the schedule.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from graph_capture.private_torch.inductor_fusion import JoinOnce

from .expected_peak import ExpectedMemory


@dataclass(frozen=True, kw_only=True)
class WithinMemory:
    """Runs may be joined while the memory between them stays within a limit.

    Parameters
    ----------
    memory_bytes
        Of each run of the schedule.
    limit_bytes
        The most that a joined kernel may bring it to; 0 joins nothing.
    expected
        What the code is expected to hold, run by run.
    """

    memory_bytes: Sequence[int]
    limit_bytes: int
    expected: ExpectedMemory

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

    def may_share_a_call(self, runs: Collection[int]) -> bool:
        """Whether nothing that one of these runs reads last need be freed before their end."""
        first, last = min(runs), max(runs)
        made_bytes = sum(self.expected.made_bytes[first + 1 : last + 1])
        return self.expected.memory_bytes[first] + made_bytes <= self.expected.peak_bytes


__all__ = ["WithinMemory"]
