"""A step in blocks as one rank of ``fully_shard`` runs it: gathers, reductions, and what they hold.

The step of the whole model becomes that of the fullest rank. Its parameters are shards, and
around the blocks' forward and backward there are operators for what FSDP2 does then, in its
order: all-gathers, the next group's in backward ahead of time; parameters freed after forward
and backward; gradients copied, reduced and kept as shards. They take no time, since nothing is
known of the network, and run once. What lives between them are storages of the step, so
that each block's plan is chosen beside what is really there at its moments.

Source: ``torch/distributed/fsdp/_fully_shard`` (``_fsdp_state.py``, ``_fsdp_param_group.py``), as
commented below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from graph_capture.cost_graph import Category, CostGraph, Operator, Phase, Storage
from graph_capture.folding.leaving import ACCUMULATE
from graph_capture.loop.fully_sharded import FullySharded, GroupBytes
from solvers.block_plans.stepping import BlockedStep

TARGET = "fsdp2"
_PINNED = "fully_shard does it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What is gathered and reduced together.

    Parameters
    ----------
    path
        The block; empty for the root, whose are all parameters outside of blocks.
    call
        Its call in the step; ``None`` for the root.
    parameters
        Storages of its parameters in the rest of the step, with the bytes of a shard of each.
    gradients
        Storages of their gradients, likewise.
    num_bytes
        What gathering and reducing it takes.
    at_end
        Whether its gradients are reduced when backward has ended, since no tensor of its call
        gets a gradient.
    """

    path: str
    call: int | None
    parameters: dict[int, int]
    gradients: tuple[int, ...]
    num_bytes: GroupBytes
    at_end: bool = False


def sharded_step(
    step: BlockedStep, groups: Sequence[Group], options: FullySharded, *, accumulates: bool
) -> BlockedStep:
    """Return the step as the fullest rank runs it.

    Parameters
    ----------
    groups
        The root, if it has parameters, and then the blocks in the order of their calls.
    accumulates
        Whether gradients are there before the step.
    """
    return _Sharding(step, groups, options, accumulates).run()


@dataclass
class _State:
    """Where a group's parameters are, while the step goes on."""

    group: Group
    pending: int | None = None  # the buffer of an all-gather that was begun
    gathered: int | None = None
    kept: int | None = None  # shards among fewer ranks
    reduced: bool = False

    @property
    def name(self) -> str:
        return self.group.path or "root"


@dataclass
class _Sharding:
    """Goes through the rest of a step and does what FSDP2 does at each moment."""

    step: BlockedStep
    groups: Sequence[Group]
    options: FullySharded
    accumulates: bool
    operators: list[Operator] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)

    def __post_init__(self) -> None:
        rest = self.step.rest
        shards = {k: n for group in self.groups for k, n in group.parameters.items()}
        unsharded = {k for group in self.groups for k in group.gradients}
        self.storages = [
            replace(s, size_bytes=shards.get(k, s.size_bytes), kept=s.kept and k not in unsharded)
            for k, s in enumerate(rest.storages)
        ]
        self.states = [_State(group) for group in self.groups]
        self.order: list[_State] = []  # comm_ctx.post_forward_order
        self.last_buffer: int | None = None  # comm_ctx.all_gather_state
        self.last_reduced: int | None = None  # comm_ctx.reduce_scatter_states
        self.sharded_gradients: list[int] = []
        self.named: Counter[str] = Counter()
        self.phase: Phase = "forward"

    def run(self) -> BlockedStep:
        rest = self.step.rest
        root = next((s for s in self.states if s.group.call is None), None)
        ahead, behind = {}, {}
        for state in self.states:
            if state.group.call is not None:
                call = self.step.calls[state.group.call]
                ahead[call.forward], behind[call.backward] = state, state
        earlier = self._earlier()
        at: dict[int, int] = {}
        begun = forward = False  # the root's
        for v, op in enumerate(rest.operators):
            if not begun:
                begun = True
                self._pre_forward(root)
            if not forward and op.phase != "forward":
                forward = True
                self._root_post_forward(root)
            if self.phase != op.phase and op.phase == "backward":
                self.phase = "backward"
                self._pre_backward(root)
            if op.phase == "optimizer":
                self._finish(earlier)
                op = self._updating(op)
            if v in ahead:
                self._pre_forward(ahead[v])
            if v in behind:
                self._pre_backward(behind[v])
            at[v] = len(self.operators)
            self._push(op)
            if v in ahead:
                self._post_forward(ahead[v])
            if v in behind and not behind[v].group.at_end:
                self._post_backward(behind[v], earlier)
        self._finish(earlier)
        calls = tuple(
            replace(call, forward=at[call.forward], backward=at[call.backward])
            for call in self.step.calls
        )
        graph = CostGraph(tuple(self.operators), tuple(self.storages))
        return BlockedStep(graph, self.step.blocks, calls)

    # -- the hooks of FSDPState and FSDPParamGroup ---------------------------------------

    def _pre_forward(self, state: _State | None) -> None:
        if state is None:
            return
        self._unshard(state)
        self._wait(state, is_forward=True)

    def _post_forward(self, state: _State, *, reshards: bool | int | None = None) -> None:
        to = self.options.reshard_after_forward if reshards is None else reshards
        if to is not False:
            if to is not True:
                kept = self._storage(f"{state.name}/kept", state.group.num_bytes.kept)
                self._add(state, "keep_after_forward", read=[state.gathered], made=[kept])
                state.kept = kept
            self._free(state, "reshard_after_forward", [state.gathered])
            state.gathered = None
        self.order.append(state)

    def _root_post_forward(self, root: _State | None) -> None:
        if root is not None:
            self._post_forward(root, reshards=self.options.reshard_root)
        some = root or next(iter(self.states), None)
        if some is not None and self.last_buffer is not None:
            self._free(some, "forward_ends", [self.last_buffer])
            self.last_buffer = None

    def _pre_backward(self, state: _State | None) -> None:
        if state is None:
            return
        self._unshard(state)
        self._wait(state, is_forward=False)
        at = self.order.index(state)
        if at > 0:
            self._unshard(self.order[at - 1])  # _backward_prefetch

    def _post_backward(self, state: _State, earlier: dict[int, int]) -> None:
        group = state.group
        state.reduced = True
        freed = [state.gathered, self.last_reduced]
        self._free(state, "reshard_after_backward", freed)
        state.gathered = self.last_reduced = None
        if not group.gradients:
            return
        num_bytes = group.num_bytes
        here = self.groups.index(group)
        if self.options.no_sync:
            adding = [*group.gradients, earlier[here]]
            self._add(state, "accumulate", read=adding, target=ACCUMULATE)
        reduced = self._storage(f"{state.name}/reduce_input", num_bytes.reduced)
        self._add(state, "copy_gradients", read=group.gradients, made=[reduced])
        self.last_reduced = reduced
        casts = num_bytes.result != num_bytes.gradients
        adds = self.accumulates and not self.options.no_sync
        gradients = self._storage(
            f"{state.name}/sharded_gradients", num_bytes.gradients, "gradient", kept=not adds
        )
        result = gradients
        if casts:
            result = self._storage(f"{state.name}/reduce_output", num_bytes.result)
        scratch = num_bytes.reducing
        self._add(state, "reduce_scatter", read=[reduced], made=[result], scratch_bytes=scratch)
        if casts:
            self._add(state, "cast_gradients", read=[result], made=[gradients])
        if adds:
            adding = [gradients, earlier[here]]
            self._add(state, "accumulate", read=adding, target=ACCUMULATE)
            gradients = earlier[here]
        self.sharded_gradients.append(gradients)

    def _finish(self, earlier: dict[int, int]) -> None:
        """``_root_post_backward_final_callback``."""
        for state in self.states:
            if not state.reduced:
                self._post_backward(state, earlier)
        left = [self.last_reduced, *(state.pending for state in self.states)]
        if self.states:
            self._free(self.states[0], "backward_ends", left)
        self.last_reduced = None
        for state in self.states:
            state.pending = None

    def _unshard(self, state: _State) -> None:
        if state.gathered is not None or state.pending is not None:
            return
        num_bytes = state.group.num_bytes
        state.pending = self._storage(f"{state.name}/all_gather", num_bytes.buffer)
        read = [self.last_buffer, state.kept] if self.phase == "forward" else [state.kept]
        scratch = num_bytes.gathering
        self._add(state, "all_gather", read=read, made=[state.pending], scratch_bytes=scratch)

    def _wait(self, state: _State, *, is_forward: bool) -> None:
        if state.pending is None:
            return
        state.gathered = self._storage(f"{state.name}/gathered", state.group.num_bytes.gathered)
        read = [state.pending, state.kept]
        self._add(state, "copy_out", read=read, made=[state.gathered])
        self.last_buffer = state.pending if is_forward else None
        state.pending = state.kept = None

    # -- operators and storages ----------------------------------------------------------

    def _earlier(self) -> dict[int, int]:
        """Storages of earlier gradients, by the index of the group."""
        if not self.accumulates:
            return {}
        found = {}
        for i, group in enumerate(self.groups):
            num_bytes = group.num_bytes
            held = num_bytes.unsharded if self.options.no_sync else num_bytes.gradients
            name = f"{group.path or 'root'}/earlier_gradients"
            found[i] = self._storage(name, held, "gradient", resident=True)
        return found

    def _updating(self, op: Operator) -> Operator:
        """The optimizer reads sharded gradients instead of whole ones."""
        whole = {k for group in self.groups for k in group.gradients}
        others = [k for k in op.inputs if k not in whole]
        return replace(op, inputs=tuple(sorted({*others, *self.sharded_gradients})))

    def _storage(
        self,
        name: str,
        num_bytes: int,
        category: Category = "gathered",
        *,
        kept: bool = False,
        resident: bool = False,
    ) -> int:
        """A new storage; its producer is the next operator."""
        self.named[name] += 1
        number = f"_{self.named[name]}" if self.named[name] > 1 else ""
        self.storages.append(
            Storage(
                name=f"{TARGET}/{name}{number}",
                size_bytes=num_bytes,
                producer=None if resident else len(self.operators),
                category=category,
                kept=kept,
            )
        )
        return len(self.storages) - 1

    def _free(self, state: _State, what: str, read: Iterable[int | None]) -> None:
        if any(k is not None for k in read):
            self._add(state, what, read=read)

    def _add(
        self,
        state: _State,
        what: str,
        *,
        read: Iterable[int | None],
        made: Sequence[int] = (),
        scratch_bytes: int = 0,
        target: str = "",
    ) -> None:
        inputs = sorted({k for k in read if k is not None})
        self._push(
            Operator(
                name=f"{TARGET}/{state.name}/{what}_{len(self.operators)}",
                target=target or f"{TARGET}.{what}",
                inputs=tuple(inputs),
                outputs=tuple(made),
                workspace_bytes=scratch_bytes,
                phase=self.phase,
                pinned=_PINNED,
                ordered=True,
                module_path=state.group.path,
            )
        )

    def _push(self, op: Operator) -> None:
        for k in op.outputs:
            self.storages[k] = replace(self.storages[k], producer=len(self.operators))
        self.operators.append(op)


__all__ = ["Group", "sharded_step"]
