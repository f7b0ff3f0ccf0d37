"""PyTorch's min-cut partitioner as a strategy: its saved set, replayed on our graph.

The partitioner of ``torch.compile`` (``torch._functorch.partitioners``) cuts a joint
graph of forward and backward where the fewest bytes cross. Before that, its heuristics
ban what they consider expensive from recomputation. ``activation_memory_budget`` below 1
lifts bans step by step and then solves a knapsack. The budget is a share of the sum of
saved bytes, between saving inputs only (0) and the default (1). It is not a peak, and
the choice may be far below the requested share.

Here the partitioner gets the captured step itself (``min_cut_graph.py``): eager's calls,
as in the backend ``aot_eager``, not decomposed as for Inductor. Its lists, knapsack and
time estimator are torch's own. Whole norms and softmax (``native_layer_norm``,
``native_batch_norm``, ``_softmax``) are not on its list of what may be recomputed, but
most of the pieces that Inductor decomposes them into are. So near budget 1 it
recomputes less and saves more here than under Inductor. Its saved set is replayed by
``solvers.strategies.schedule_for_saved``: views save their storage, parameters and
inputs cost nothing.

In the partitioner's favour, dropout is split into a mask of one byte per element and its
scaling, masks that it recomputes are drawn again with the right numbers, and runs come
as late as possible.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.graph import Graph

from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph
from graph_capture.private_torch.compiler import functorch_config, functorch_partitioners
from graph_capture.units import format_bytes
from solvers.strategies.saved import schedule_for_saved
from solvers.strategies.strategy import Candidate, Strategy, StrategyError, StrategyOptions

from .min_cut_graph import JointGraph, joint_graph

BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Values of ``activation_memory_budget``; PyTorch's default comes first."""


def min_cut_strategy(captured: CapturedStep, budgets: Sequence[float] = BUDGETS) -> Strategy:
    """Return the partitioner's choices for a captured step, a candidate per budget.

    Parameters
    ----------
    captured
        The step that the strategy will be applied to.
    budgets
        Values of ``activation_memory_budget``, from 0 to 1. The first one is used if
        there is no memory budget.

    Raises
    ------
    ValueError
        When there is no budget, or one is out of range.

    Notes
    -----
    The strategy raises :class:`StrategyError` for another step's graph, and if the
    partitioner of the installed torch cannot be used or fails.
    """
    if not budgets or not all(0 <= budget <= 1 for budget in budgets):
        raise ValueError(f"activation_memory_budget goes from 0 to 1, got {tuple(budgets)}")
    asking = _Asking(captured)

    def propose(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
        if graph.storages != captured.graph.storages:
            raise StrategyError(
                "min_cut was made for another step; make it from this one's capture"
            )
        for budget in budgets:
            saved = asking.saved(budget)
            num_bytes = sum(graph.storages[k].size_bytes for k in saved)
            yield Candidate(
                schedule=schedule_for_saved(graph, saved),
                setting=f"budget={budget:g}",
                note=f"saves {format_bytes(num_bytes)}; {asking.partitioner.note}",
            )

    return Strategy(
        name="min_cut",
        summary="saves where the fewest bytes cross from forward to backward, at shares of them",
        source="torch._functorch.partitioners, activation_memory_budget",
        propose=propose,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Partitioner:
    """The partitioner of the installed torch.

    Parameters
    ----------
    partition
        ``min_cut_rematerialization_partition``.
    config
        ``torch._functorch.config``.
    """

    partition: Callable[..., tuple[GraphModule, GraphModule]]
    config: ModuleType

    @classmethod
    def installed(cls) -> Partitioner:
        """Look for it.

        Raises
        ------
        StrategyError
            When this torch has none that accepts our arguments.
        """
        try:
            config, partitioners = functorch_config(), functorch_partitioners()
        except ImportError as error:
            raise _cannot_ask(str(error)) from error
        partition = getattr(partitioners, "min_cut_rematerialization_partition", None)
        if partition is None:
            raise _cannot_ask("min_cut_rematerialization_partition is not there")
        parameters = inspect.signature(partition).parameters
        if not {"num_fwd_outputs", "static_lifetime_input_indices"} <= parameters.keys():
            raise _cannot_ask(f"the partitioner takes {', '.join(parameters)}")
        if not hasattr(config, "activation_memory_budget"):
            raise _cannot_ask("torch._functorch.config has no activation_memory_budget")
        return cls(partition=partition, config=config)

    @property
    def note(self) -> str:
        """How it decides: its knapsack solver and its time estimator."""
        solver = getattr(self.config, "activation_memory_budget_solver", "unknown")
        estimator = getattr(self.config, "activation_memory_budget_runtime_estimator", "unknown")
        return f"torch {torch.__version__}, knapsack by {solver!r}, times by {estimator!r}"

    def saved(self, joint: JointGraph, budget: float) -> list[str]:
        """Names of the nodes that it saves at a value of ``activation_memory_budget``.

        Raises
        ------
        StrategyError
            When the partitioner fails on the graph.
        """
        graph = Graph()
        graph.output(graph.graph_copy(joint.graph, {}))  # the partitioner changes its argument
        inputs = [n.meta["val"] for n in graph.find_nodes(op="placeholder")]
        module = GraphModule(nn.Module(), graph)
        try:
            with self.config.patch(activation_memory_budget=budget):
                forward, _ = self.partition(
                    module,
                    inputs,
                    num_fwd_outputs=joint.num_forward_outputs,
                    static_lifetime_input_indices=list(joint.static_inputs),
                )
        except Exception as error:  # it may raise anything on this graph; it has no answer then
            raise StrategyError(
                f"min_cut: the partitioner of torch {torch.__version__} fails at budget "
                f"{budget:g}: {type(error).__name__}: {error}"
            ) from error
        (outputs,) = forward.graph.find_nodes(op="output")[0].args
        return [n.name for n in outputs[joint.num_forward_outputs :] if isinstance(n, Node)]


class _Asking:
    """The partitioner's answers so far on one step.

    Parameters
    ----------
    captured
        The step. Its joint graph is made for the first answer.
    """

    def __init__(self, captured: CapturedStep) -> None:
        self._captured = captured
        self._answers: dict[float, frozenset[int]] = {}

    @cached_property
    def partitioner(self) -> Partitioner:
        return Partitioner.installed()

    @cached_property
    def _joint(self) -> JointGraph:
        try:
            return joint_graph(self._captured)
        except ValueError as error:
            raise StrategyError(f"min_cut takes no step that writes in place: {error}") from error

    def saved(self, budget: float) -> frozenset[int]:
        """Storages that it saves, without resident ones."""
        if budget not in self._answers:
            names = self.partitioner.saved(self._joint, budget)
            storages = self._captured.graph.storages
            self._answers[budget] = frozenset(
                k
                for k in (self._joint.storage_of.get(name) for name in names)
                if k is not None and storages[k].producer is not None
            )
        return self._answers[budget]


def _cannot_ask(why: str) -> StrategyError:
    return StrategyError(f"min_cut cannot be asked on torch {torch.__version__}: {why}")


def saved_storages(captured: CapturedStep, budget: float = 1.0) -> frozenset[int]:
    """The storages that the partitioner saves at one value of ``activation_memory_budget``.

    Raises
    ------
    StrategyError
        When the partitioner cannot be used, or fails.
    """
    return _Asking(captured).saved(budget)


__all__ = ["BUDGETS", "min_cut_strategy", "saved_storages"]
