"""Split a planned backward graph, so that gradients leave as they are made.

Autograd hands a gradient on when the node that computed it ends. A step that is one node
hands all of them on at its very end, and whoever waits for gradients
(``DistributedDataParallel``'s all-reduces, an optimizer in a hook) waits for the whole
backward pass. So the graph is cut after every so many bytes of gradients, and each
segment is run by an autograd node of its own (``planner.running.autograd_chain``).
What lives across a cut stays hidden from autograd, in a dictionary.

A gradient leaves only after the last operator that reads it or its parameter, since its
hooks may write to both.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from graph_capture.folding.leaving import least_group_bytes
from graph_capture.private_torch.autograd import set_grad_enabled

from .generators import RESUMES, REWINDS


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a backward graph.

    Parameters
    ----------
    graph
        Takes one list of tensors, which it empties, and returns the gradients that leave
        here, then what later segments read.
    takes
        Names of the values that it takes, and whether it is the last to read them.
    gives
        Names of what it returns for later segments.
    gradients
        The gradients that leave, as indices into those of the whole step.
    """

    graph: GraphModule
    takes: tuple[tuple[str, bool], ...]
    gives: tuple[str, ...]
    gradients: tuple[int, ...]

    def run(self, values: dict[str, Any]) -> list[Any]:
        """Return the gradients that leave here.

        Parameters
        ----------
        values
            What lives at the beginning, by name; afterwards, what lives at the end.
        """
        boxed = [values.pop(name) if last else values[name] for name, last in self.takes]
        found: list[Any] = self.graph.forward(boxed)
        num_gradients = len(self.gradients)
        values.update(zip(self.gives, found[num_gradients:], strict=True))
        del found[num_gradients:]
        return found


@dataclass(frozen=True, slots=True)
class Backward:
    """A backward graph, and its segments if it has more than one."""

    graph: GraphModule
    segments: tuple[Segment, ...]


def split(
    backward: GraphModule,
    sizes: Sequence[int],
    owners: Sequence[int],
    compiled: Callable[[Graph, str], GraphModule],
    cuts: Sequence[int] = (),
    turns: Sequence[int] = (),
) -> tuple[Segment, ...]:
    """Cut a backward graph after every so many bytes of gradients.

    Parameters
    ----------
    backward
        Returns the list of gradients. Each node's ``meta["memory"]`` says which memory its
        value is in.
    sizes
        Bytes of each gradient.
    owners
        The memory of what each gradient is for.
    compiled
        Makes a module of a graph.
    cuts
        Where the schedule itself says so, the runs after which gradients leave.
    turns
        For each gradient its turn among all, where none may leave before those whose turn
        is earlier.

    Returns
    -------
    tuple of Segment
        Empty where one segment is all.
    """
    nodes = list(backward.graph.nodes)
    leaving = _leaving(nodes, owners)
    if turns:
        leaving = _in_turn(leaving, turns)
    ends = _ends_at(nodes, cuts) if cuts else _ends(nodes, sizes, leaving)
    if len(ends) == 1:
        return ()
    return tuple(_segments(nodes, ends, leaving, compiled))


def _leaving(nodes: Sequence[Node], owners: Sequence[int]) -> list[int]:
    """For each gradient the place of the last node that reads it or what it is for."""
    place = {node: i for i, node in enumerate(nodes)}
    last_read: dict[int, int] = {}
    for node in nodes[:-1]:
        for read in node.all_input_nodes:
            memory = read.meta.get("memory")
            if memory is not None:
                last_read[memory] = place[node]
    leaving = []
    gradients = _results(nodes)
    for gradient, owner in zip(gradients, owners, strict=True):
        memory = gradient.meta["memory"]
        leaving.append(max(place[gradient], last_read.get(memory, 0), last_read.get(owner, 0)))
    together: dict[int, int] = {}  # gradients in one block of memory leave together
    for gradient, at in zip(gradients, leaving, strict=True):
        memory = gradient.meta["memory"]
        together[memory] = max(together.get(memory, 0), at)
    return [together[gradient.meta["memory"]] for gradient in gradients]


def _in_turn(leaving: Sequence[int], turns: Sequence[int]) -> list[int]:
    """The places of :func:`_leaving`, put off until all gradients of earlier turns leave."""
    by_turn = sorted(range(len(turns)), key=turns.__getitem__)
    latest = itertools.accumulate((leaving[j] for j in by_turn), max)
    put_off = dict(zip(by_turn, latest, strict=True))
    return [put_off[j] for j in range(len(leaving))]


def _ends(nodes: Sequence[Node], sizes: Sequence[int], leaving: Sequence[int]) -> list[int]:
    """The place of the last node of each segment."""
    bucket = least_group_bytes(sum(sizes))
    safe = _safe_places(nodes)
    last = len(nodes) - 2  # the output comes after
    ends: list[int] = []
    gathered = 0
    by_place = sorted(zip(leaving, sizes, strict=True))
    for (at, size), following in itertools.pairwise([*by_place, (last, 0)]):
        gathered += size
        if gathered < bucket or following[0] == at:
            continue
        end = next((i for i in range(at, last) if safe[i]), last)
        if end < last and (not ends or end > ends[-1]):
            ends.append(end)
            gathered = 0
    return [*ends, last]


def _ends_at(nodes: Sequence[Node], cuts: Sequence[int]) -> list[int]:
    """The place of the last node of each segment, where segments end with certain runs."""
    last = len(nodes) - 2
    moments = [node.meta.get("moment", -1) for node in nodes[:-1]]
    ends = {max(i for i, moment in enumerate(moments) if moment <= cut) for cut in cuts}
    return sorted({end for end in ends if moments[end] >= 0} | {last})


def _safe_places(nodes: Sequence[Node]) -> list[bool]:
    """Whether grad mode and generators are as autograd finds them after each node."""
    safe, enabled, rewound = [], False, 0
    rewinds: set[Any] = set(REWINDS.values())
    resumes: set[Any] = set(RESUMES.values())
    for node, following in itertools.pairwise(nodes):
        if node.target is set_grad_enabled:
            enabled = bool(node.args[0])
        if node.op == "call_function":
            rewound += (node.target in rewinds) - (node.target in resumes)
        whole = following.target is not operator.getitem
        safe.append(node.op != "placeholder" and whole and not enabled and not rewound)
    return safe


def _segments(
    nodes: Sequence[Node],
    ends: Sequence[int],
    leaving: Sequence[int],
    compiled: Callable[[Graph, str], GraphModule],
) -> Iterator[Segment]:
    gradients = _results(nodes)
    segment_of: dict[Node, int] = {}
    for i, node in enumerate(nodes[:-1]):
        segment_of[node] = 0 if node.op == "placeholder" else _first_at_or_after(ends, i)
    leaves_in = [_first_at_or_after(ends, at) for at in leaving]
    last_reader = {
        node: max((segment_of[u] for u in node.users if u.op != "output"), default=-1)
        for node in segment_of
    }
    for gradient, s in zip(gradients, leaves_in, strict=True):
        last_reader[gradient] = max(last_reader[gradient], s)
    for s in range(len(ends)):
        graph, taken = Graph(), []
        own: dict[Node, Node] = {}
        body = [n for n in nodes[:-1] if n.op != "placeholder" and segment_of[n] == s]
        mine = tuple(j for j, at in enumerate(leaves_in) if at == s)
        read = [*(n for node in body for n in node.all_input_nodes), *(gradients[j] for j in mine)]
        for node in dict.fromkeys(read):
            if node.op == "placeholder" or segment_of[node] < s:
                own[node] = graph.placeholder(node.name)
                own[node].meta = dict(node.meta)
                taken.append((node.name, last_reader[node] == s))
        for node in body:
            own[node] = graph.node_copy(node, own.__getitem__)
        given = [node for node in body if last_reader[node] > s]
        graph.output([*(own[gradients[j]] for j in mine), *(own[node] for node in given)])
        yield Segment(
            graph=compiled(graph, f"PlannedBackward{s}"),
            takes=tuple(taken),
            gives=tuple(node.name for node in given),
            gradients=mine,
        )


def _results(nodes: Sequence[Node]) -> list[Node]:
    """What the graph returns."""
    results: Any = nodes[-1].args[0]
    return list(results)


def _first_at_or_after(ends: Sequence[int], place: int) -> int:
    return next(s for s, end in enumerate(ends) if place <= end)
