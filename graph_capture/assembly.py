"""Give operators and storages their final indices, costs and sizes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.fx import Graph, Node

from .captured_step import CapturedStep
from .cost_graph import Category, CostGraph, Operator, Phase, Storage
from .costs.allocator import block_bytes
from .folding.blocks import Block, OperatorCode
from .folding.call_prices import CallPrices, beside
from .folding.leaving import ACCUMULATE, CONSUME, COPY_OUTPUTS, Leaving, arrivals_of, groups_of
from .folding.operators import item_index
from .folding.pricing import Pricing
from .loop.consumption import consumption, in_turn
from .loop.data_parallel import scaling_bytes
from .loop.loss import LossSource
from .loop.optimizer_step import OptimizerStep
from .tracing.traced_step import TracedStep


class Assembly:
    """Gives operators and storages their final indices."""

    def __init__(
        self,
        step: TracedStep,
        blocks: list[Block],
        output_blocks: set[int],
        gradient_blocks: set[int],
        optimizer: OptimizerStep | None,
        pricing: Pricing,
        leaving: Leaving,
    ) -> None:
        self._step = step
        self._pricing = pricing
        self._blocks = blocks
        self._outputs = output_blocks
        self._gradients = gradient_blocks
        self._optimizer = optimizer
        self._leaving = leaving
        self._device_type = pricing.target.torch_type
        self._prices = CallPrices(pricing)
        self.operators: list[Operator] = []
        self.storages: list[Storage] = []
        self.code: list[OperatorCode] = []
        self.carriers: list[tuple[Node, ...]] = []
        self.state_of: dict[int, int] = {}
        self._storage_of: dict[int, int] = {}
        self._buckets: int | None = None
        self._copy_of: dict[Node, int] = {}  # by the output
        self._earlier_gradients: int | None = None
        self._groups: Mapping[int, Sequence[Sequence[int]]] = {}  # by the place that they follow
        self._state_node = Graph().placeholder("generator_state")
        self._state_node.meta["role"] = "generator"

    def finish(
        self, codes: list[OperatorCode], loss: OperatorCode, model: weakref.ref[nn.Module]
    ) -> CapturedStep:
        phase: Phase = "forward"
        for k, block in enumerate(self._blocks):
            if block.producer is None:
                self._add_block(k, None, phase)
        calls = [call.target for code in codes for call in code.calls]
        for name, num_bytes, category in beside(self._step, self._pricing, self._optimizer, calls):
            self._add_storage(name, num_bytes, None, category)
        if self._pricing.bucket_bytes:
            num_bytes = block_bytes(self._pricing.bucket_bytes, self._device_type)
            self._buckets = self._add_storage(
                "buckets of DistributedDataParallel", num_bytes, None, "bucket"
            )
        self._group(codes, codes.index(loss))
        loss_index = -1
        for place, code in enumerate(codes):
            if code is loss:
                self._add_copies_of_outputs()
                loss_index = self._add_loss(code)
                phase = "backward"
            else:
                self._add_operator(code, phase)
            for new in self._groups.get(place, ()):
                self._add_handing_on(new)
        if self._optimizer is not None and not self._pricing.holds.consumes:
            self._add_optimizer()
        return CapturedStep(
            step=self._step,
            graph=CostGraph(tuple(self.operators), tuple(self.storages)),
            code=tuple(self.code),
            carriers=tuple(self.carriers),
            state_of=self.state_of,
            state_node=self._state_node,
            loss=loss_index,
            target=self._pricing.target,
            optimizer=self._optimizer,
            model=model,
        )

    # -- operators -------------------------------------------------------------

    def _add_operator(self, code: OperatorCode, phase: Phase) -> None:
        inputs = {self._storage_of[k] for k in code.reads.values()}
        inputs |= {self._storage_of[old] for old, _ in code.clones}
        if code.draws and code.pinned is None:
            inputs.add(self._add_generator_state(code, phase))
            self.state_of[len(self.operators)] = len(self.operators) - 1
        v = len(self.operators)
        outputs = tuple(self._add_block(k, v, phase) for k in code.outputs)
        costs = [self._prices.of(call) for call in code.calls]
        for call in code.calls:
            self._correct_outputs(call, code)
        last = code.calls[-1]
        rewrites, copies_ns = self._rewrites(code)
        self._push(
            code,
            Operator(
                name=last.name,
                target="+".join(str(call.target) for call in code.calls),
                inputs=tuple(sorted(inputs)),
                outputs=outputs,
                cost_ns=sum(cost for cost, _ in costs) + copies_ns,
                workspace_bytes=max(workspace for _, workspace in costs),
                phase=phase,
                pinned=code.pinned or self._why_once(code),
                ordered=code.ordered,
                module_path=last.meta["module_path"],
                source=last.meta["source"],
                rewrites=rewrites,
            ),
        )

    def _why_once(self, code: OperatorCode) -> str | None:
        if self._leaving.at_once or self._leaving.gradients.keys().isdisjoint(code.outputs):
            return None
        return "it makes a gradient, which is handed on"

    def _rewrites(self, code: OperatorCode) -> tuple[tuple[tuple[int, int, int], ...], int]:
        """What an operator may write over instead of to a copy, and the time of other copies.

        What comes from the loop, or in backward from forward, is not its own: a backward
        pass may be repeated.
        """
        rewrites: list[tuple[int, int, int]] = []
        copies_ns = 0
        for old, new in code.clones:
            copy_ns = self._prices.clone_ns(self._blocks[old].carriers[0])
            producer = self._blocks[old].producer
            k, into = self._storage_of[old], self._storage_of[new]
            own = producer is not None and producer.calls and producer.calls[0].meta["phase"]
            same = self.storages[k].size_bytes == self.storages[into].size_bytes
            handed_out = self.storages[k].kept or old in self._outputs | self._gradients
            if own == code.calls[0].meta["phase"] and same and not handed_out:
                rewrites.append((k, into, copy_ns))
            else:
                copies_ns += copy_ns
        return tuple(rewrites), copies_ns

    def _add_generator_state(self, code: OperatorCode, phase: Phase) -> int:
        """The state before a draw, with which it can be repeated; it lies in host memory."""
        v = len(self.operators)
        num_bytes = torch.random.get_rng_state().numel() if self._device_type == "cpu" else 0
        name = f"generator_state_{len(self.state_of)}"
        k = self._add_storage(name, num_bytes, v, "activation")
        self._push(
            OperatorCode(calls=[]),
            Operator(
                name=name,
                target="get_rng_state",
                outputs=(k,),
                phase=phase,
                pinned="the state of the generator at this moment",
                ordered=True,
                module_path=code.calls[-1].meta["module_path"],
            ),
        )
        return k

    def _add_loss(self, code: OperatorCode) -> int:
        v = len(self.operators)
        region = self._step.loss
        read = {self._copy_of.get(n, self._storage_of[k]) for n, k in code.reads.items()}
        outputs = [self._add_tangent(k, v) for k in code.outputs]
        if region.held_bytes:
            outputs.append(self._add_storage("loss", region.held_bytes, v, "output", kept=True))
        self._push(
            code,
            Operator(
                name="loss",
                target=str(region.source),
                inputs=tuple(sorted(read)),
                outputs=tuple(outputs),
                cost_ns=self._prices.region_ns(region.calls),
                workspace_bytes=region.workspace_bytes,
                phase="loss",
                pinned="it belongs to the training loop",
                ordered=True,
            ),
        )
        return v

    def _add_copies_of_outputs(self) -> None:
        """``DistributedDataParallel`` copies outputs where it looks for unused parameters."""
        copied = self._leaving.copied
        if not copied:
            return
        v = len(self.operators)
        outputs = []
        for i, copy in enumerate(copied):
            value = copy.node.meta["val"]
            num_bytes = block_bytes(value.numel() * value.element_size(), self._device_type)
            held = copy.replaced and copy.block not in self._leaving.outputs
            outputs.append(
                self._add_storage(f"copy of output {i}", num_bytes, v, "output", kept=held)
            )
            if copy.replaced:
                self._copy_of[copy.node] = outputs[-1]
        self._push(
            OperatorCode(calls=[]),
            Operator(
                name=COPY_OUTPUTS,
                target=COPY_OUTPUTS,
                inputs=tuple(sorted({self._storage_of[copy.block] for copy in copied})),
                outputs=tuple(outputs),
                cost_ns=sum(self._prices.clone_ns(copy.node) for copy in copied),
                phase="forward",
                pinned="DistributedDataParallel copies outputs",
                ordered=True,
            ),
        )

    def _add_tangent(self, k: int, v: int) -> int:
        """The gradient of an output; freed at its last use unless someone else holds it.

        The autograd engine holds what is not handed over (scalars), the caller
        what it passes to ``backward``.
        """
        storage = self._add_block(k, v, "loss")
        scalar = self._blocks[k].carriers[0].meta["val"].numel() <= 1
        if scalar or self._step.loss.source is LossSource.OUTPUTS:
            self.storages[storage] = replace(self.storages[storage], kept=True)
        return storage

    def _group(self, codes: Sequence[OperatorCode], turn: int) -> None:
        """Say which gradients leave together, and after which operator."""
        leaving = self._leaving
        if not leaving.gradients:
            return
        if self._pricing.holds.in_buckets:
            self._earlier_gradients = self._buckets
        elif self._pricing.holds.accumulates:
            self._add_earlier_gradients()
        if leaving.at_once:
            position = {node: i for i, node in enumerate(self._step.graph.nodes)}
            arriving = arrivals_of(codes, turn, leaving, position)
            self._groups = {place: [[k] for k in new] for place, new in arriving.items()}
            return
        groups = groups_of(codes, turn, leaving.gradients, self._blocks)
        self._groups = {place: [new] for place, new in groups.items()}

    def _add_handing_on(self, new: Sequence[int]) -> None:
        if self._pricing.holds.consumes:
            self._add_consumption(new)
        else:
            self._add_accumulation(new)

    def _add_consumption(self, new: Sequence[int]) -> None:
        """What hooks do with gradients as they arrive: an optimizer updates their parameters."""
        index = {k: i for i, k in enumerate(self._leaving.gradients)}
        order = in_turn((self._blocks[k].size_bytes, index[k], k) for k in new)
        taken = consumption(
            [
                (self._leaving.names[k], self.storages[self._storage_of[k]].size_bytes)
                for k in order
            ],
            self._optimizer,
            # Gradients of tensors of the call arrive among them, and where is not known.
            in_order=all(leaf.meta["role"] == "parameter" for leaf, _ in self._step.gradients),
        )
        self._push(
            OperatorCode(calls=[]),
            Operator(
                name=f"{CONSUME}_{len(self.operators)}",
                target=CONSUME,
                inputs=tuple(sorted(self._storage_of[k] for k in new)),
                cost_ns=self._prices.region_ns(taken.calls),
                workspace_bytes=taken.workspace_bytes,
                phase="backward",
                pinned="hooks consume gradients as they arrive",
                ordered=True,
            ),
        )

    def _add_earlier_gradients(self) -> None:
        num_bytes = sum(
            block_bytes(self._blocks[k].size_bytes, self._device_type)
            for k in self._leaving.gradients
            if self._blocks[k].device_type == self._device_type
        )
        self._earlier_gradients = self._add_storage(
            "gradients of earlier backward passes", num_bytes, None, "gradient"
        )

    def _add_accumulation(self, new: Sequence[int]) -> None:
        """What autograd does with new gradients where there are some: it adds them in place."""
        assert self._earlier_gradients is not None
        values = [self._blocks[k].carriers[0].meta["val"] for k in new]
        add = torch.ops.aten.add_.Tensor
        cost_ns = self._prices.region_ns(tuple((add, (t, t), {}, t) for t in values))
        read = [self._storage_of[k] for k in new]
        in_buckets = self._pricing.holds.in_buckets
        self._push(
            OperatorCode(calls=[]),
            Operator(
                name=f"{ACCUMULATE}_{len(self.operators)}",
                target=ACCUMULATE,
                inputs=tuple(sorted((*read, self._earlier_gradients))),
                cost_ns=cost_ns,
                workspace_bytes=scaling_bytes(self._device_type) if in_buckets else 0,
                phase="backward",
                pinned="autograd adds gradients to those that are there",
                ordered=True,
            ),
        )

    def _add_optimizer(self) -> None:
        assert self._optimizer is not None
        staying = self._gradients - self._leaving.gradients.keys()
        gradients = tuple(sorted(self._storage_of[k] for k in staying))
        if self._earlier_gradients is not None:
            gradients = (*gradients, self._earlier_gradients)
        step_ns = self._prices.region_ns(self._optimizer.calls)
        if not self._optimizer.calls and self._optimizer.step_ns is not None:
            step_ns = self._optimizer.step_ns
        self._push(
            OperatorCode(calls=[]),
            Operator(
                name="optimizer",
                target=self._optimizer.name,
                inputs=gradients,
                cost_ns=step_ns,
                workspace_bytes=self._optimizer.workspace_bytes,
                phase="optimizer",
                pinned="it belongs to the training loop",
                ordered=True,
            ),
        )

    def _push(self, code: OperatorCode, operator: Operator) -> None:
        """Append an operator, its code now in terms of storages instead of blocks."""
        at = self._storage_of
        self.code.append(
            replace(
                code,
                reads={node: at[k] for node, k in code.reads.items()},
                outputs=[at[k] for k in code.outputs],
                clones=[(at[old], at[new]) for old, new in code.clones],
                blanks=[at[k] for k in code.blanks],
            )
        )
        self.operators.append(operator)

    def _correct_outputs(self, call: Node, code: OperatorCode) -> None:
        """Sizes of outputs that fake tensors know nothing of."""
        sizes = self._pricing.probe.output_bytes(call.target, *self._prices.values(call))
        if sizes is None:
            return
        of_node = {n: k for k in code.outputs for n in self._blocks[k].carriers}
        for item in call.users:
            if item in of_node:
                k = self._storage_of[of_node[item]]
                num_bytes = sizes[item_index(item)]
                self.storages[k] = replace(self.storages[k], size_bytes=num_bytes)
                self._prices.resize(item, num_bytes)

    # -- storages --------------------------------------------------------------

    def _add_block(self, k: int, producer: int | None, phase: Phase) -> int:
        block = self._blocks[k]
        num_bytes = self._kept_alive(block) if block.device_type == self._device_type else 0
        num_bytes = block_bytes(num_bytes, self._device_type)
        handed_out = self._outputs | self._gradients
        leaving = self._leaving.outputs | self._leaving.gradients.keys() | self._leaving.replaced
        kept = producer is not None and k in handed_out and k not in leaving
        self._storage_of[k] = self._add_storage(
            block.name,
            num_bytes,
            producer,
            self._category(k, phase),
            kept=kept,
            carriers=tuple(block.carriers),
        )
        return self._storage_of[k]

    def _kept_alive(self, block: Block) -> int:
        """Bytes of a block; of an argument all that it keeps alive."""
        meta, of_call = block.carriers[0].meta, self._pricing.argument_bytes
        if of_call is None or block.producer is not None or meta["role"] != "input":
            return block.size_bytes
        return of_call[int(meta["target"])]

    def _category(self, k: int, phase: Phase) -> Category:
        block = self._blocks[k]
        if block.producer is None:
            role = block.carriers[0].meta["role"]
            return "buffer" if role in ("constant", "attribute") else role
        if k in self._gradients:
            return "gradient"
        if k in self._outputs:
            return "output"
        return "activation" if phase == "forward" else "temporary"

    def _add_storage(
        self,
        name: str,
        num_bytes: int,
        producer: int | None,
        category: Category,
        *,
        kept: bool = False,
        carriers: tuple[Node, ...] = (),
    ) -> int:
        self.storages.append(
            Storage(
                name=name,
                size_bytes=num_bytes,
                producer=producer,
                category=category,
                kept=kept,
            )
        )
        self.carriers.append(carriers)
        return len(self.storages) - 1
