"""What Inductor's code of a schedule is expected to take, before any is generated.

The cost graph gives every result memory of its own. Inductor writes the result of its own loops
over an argument of the same size that is read there for the last time, also over what forward
saved. Solvers know nothing of that: whether an argument is read again depends on the schedule. Of
a schedule that is found, it can be counted: on Transformers' language models the expected peak is
the generated code's within 1.5 % (T5: 3.6 %), where the schedule's own is up to 10 % above it.
"""

from __future__ import annotations

from collections import defaultdict

from solvers.replay import replay
from solvers.schedule import Schedule

from .fused_groups import is_elementwise, is_reduction
from .priced_step import PricedStep


def expected_peak_bytes(priced: PricedStep, schedule: Schedule) -> int:
    """Return the peak of a schedule whose fused kernels write over what they read last."""
    storages, replayed = priced.graph.storages, replay(priced.graph, schedule)
    tangents = set(priced.graph.operators[priced.turn].outputs)  # the caller's
    memory = list(replayed.memory_bytes)
    born, dying = defaultdict(list), defaultdict(list)
    for k, first, last in replayed.live:
        born[first].append(k)
        if first < last and not storages[k].kept and k not in tangents:
            dying[last].append(k)
    for i, v in enumerate(schedule.order):
        group = priced.groups[v]
        if not group or not all(is_elementwise(call) or is_reduction(call) for call in group):
            continue
        read = set(priced.graph.operators[v].inputs)
        free = [storages[k].size_bytes for k in dying[i] if k in read]
        for size_bytes in (storages[k].size_bytes for k in born[i]):
            if size_bytes in free:
                free.remove(size_bytes)
                memory[i] -= size_bytes
    return max(memory, default=replayed.peak_bytes)


__all__ = ["expected_peak_bytes"]
