"""PyTorch's integer program over modules, as a peer: what it is told, chooses and runs."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.zoo import ZOO
from graph_capture import capture
from graph_capture.costs.devices import device_for
from graph_capture.costs.roofline import Roofline
from planner import compare, measure
from planner.comparing.execution.run_peer import peers_warnings, run_peer
from planner.comparing.peers import PEERS, Ready, Situation
from planner.comparing.peers.module_statistics import ModuleFigures, module_figures
from planner.comparison_record import RowOutcome
from solvers.replay import replay
from solvers.schedule import Schedule
from tests.planner.comparing.peers.peer_models import (
    Layer,
    Stack,
    Statistics,
    calls_of_step,
    made,
)

PEER = PEERS["sac_ilp"]
needs_pulp = pytest.mark.skipif(
    importlib.util.find_spec("pulp") is None, reason="PuLP, of the extra 'peers', is not installed"
)


@contextlib.contextmanager
def prepared(
    model: nn.Module, sample: Any, budget_bytes: int, beside_bytes: int = 0
) -> Iterator[Ready]:
    """A copy of a model that trains by the peer."""
    situation = Situation(
        sample_input=sample,
        loss_fn=None,
        device=torch.device("cpu"),
        blocks=tuple,
        budget_bytes=budget_bytes,
        beside_bytes=beside_bytes,
    )
    with PEER.prepare(copy.deepcopy(model), situation) as ready:
        yield ready


def figures_of(model: nn.Module, sample: Any) -> ModuleFigures:
    """What the program is told, with the times of the CPU's roofline."""
    with peers_warnings():
        return module_figures(model, sample, None, Roofline(device_for("cpu")))


def unplanned_bytes(model: nn.Module, sample: Any) -> int:
    """Predicted peak of eager's step."""
    graph = capture(model, sample)
    return replay(graph, Schedule.keep_all(graph)).peak_bytes


def wrapped(model: nn.Module) -> set[str]:
    """Paths of modules whose forward runs in a checkpoint."""
    return {path for path, module in model.named_modules() if "forward" in vars(module)}


def test_it_is_told_our_times() -> None:
    """Forward of the whole model takes what the captured step's forward takes, without dropout."""
    model, sample = made(Stack)
    for layer in model.layers:
        layer.dropout.p = 0.0
    graph = capture(model, sample)
    ours_ns = sum(op.cost_ns for op in graph.operators if op.phase in ("forward", "loss"))
    root = figures_of(model, sample).graph.nodes[0]
    assert root["fqn"] == "Stack"
    assert 1e6 * root["sac_runtime"] == pytest.approx(ours_ns, rel=1e-6)


def test_it_is_told_what_modules_hold() -> None:
    """Parameters of the model, and what a layer saves: counted by hand."""
    model, sample = made(Stack)
    for layer in model.layers:
        layer.dropout.p = 0.0
    nodes = figures_of(model, sample).graph.name2node
    own = [p.numel() * p.element_size() for p in model.parameters()]
    assert nodes["Stack"]["param_per_module"] == sum(own)
    # Of a layer the arguments of sine and cosine stay, 32 × 16 floats each.
    hidden = 4 * 32 * 16
    assert nodes["Stack.layers.3"]["act_fw_per_module"] == 2 * hidden
    assert nodes["Stack.layers.3"]["output_per_module"] == hidden


@needs_pulp
def test_it_recomputes_within_its_budget() -> None:
    """Below eager's peak, modules run in checkpoints, calls run again, and the peak is lower."""
    model, sample = made(Stack)
    unplanned = unplanned_bytes(model, sample)
    with prepared(model, sample, int(0.8 * unplanned)) as ready:
        assert ready.setting.endswith(f"{len(wrapped(ready.model))} modules")
        assert wrapped(ready.model)
        again = calls_of_step(ready.model, sample) - calls_of_step(model, sample)
        peak = measure(ready.model, sample, repeats=0).peak_bytes
    assert again["sin"] + again["cos"] > 0
    assert peak < measure(model, sample, repeats=0).peak_bytes


@needs_pulp
def test_with_all_the_memory_nothing_is_recomputed() -> None:
    """Its budget is then no limit."""
    model, sample = made(Stack)
    with prepared(model, sample, 10 * unplanned_bytes(model, sample)) as ready:
        assert wrapped(ready.model) == set()


@needs_pulp
def test_saved_operators_do_not_run_again() -> None:
    """What its policy of a module saves is taken from the cache: as many calls run as it says."""
    model, sample = made(Stack)
    figures = figures_of(model, sample)
    with prepared(model, sample, int(0.85 * unplanned_bytes(model, sample))) as ready:
        plain, calls = calls_of_step(model, sample), calls_of_step(ready.model, sample)
        expected = 0
        for path in wrapped(ready.model):
            context = ready.model.get_submodule(path).forward.keywords["context_fn"]
            names = figures.operators[f"Stack.{path}"].func_names
            assert len(names) == len(context._saved)
            kept = zip(names, context._saved, strict=True)
            expected += sum(name in ("sin", "addmm") and not saved for name, saved in kept)
    again = sum(calls[name] - plain[name] for name in ("sin", "addmm"))
    assert again == expected


@needs_pulp
def test_what_it_does_not_count_is_taken_off() -> None:
    """A budget with so many bytes beside it gives the same choice as the difference alone."""
    model, sample = made(Stack)
    budget = int(0.8 * unplanned_bytes(model, sample))
    with prepared(model, sample, budget) as alone:
        expected = wrapped(alone.model)
    with prepared(model, sample, budget + 10**6, beside_bytes=10**6) as beside:
        assert wrapped(beside.model) == expected
    with prepared(model, sample, budget + 10**6) as roomy:
        assert wrapped(roomy.model) == set()


class Attending(nn.Module):
    """Attention with dropout, whose scores and scaled queries nothing keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.inward(x).view(8, 16, 4, 8).transpose(1, 2)
        mask = torch.zeros(8, 4, 16, 16)
        for _ in range(8):
            q = q + nn.functional.scaled_dot_product_attention(q, q, q, mask, dropout_p=0.1)
        return q.square().sum()


def test_draws_belong_to_what_they_fill() -> None:
    """The estimator goes by addresses: those of freed tensors must not be given again.

    A mask would be drawn into a tensor that is made anew while the draw is taken from the cache.
    """
    stats = figures_of(Attending(), torch.randn(8, 16, 32)).operators["Attending"]
    filled = [stats.func_names[parent] for _, parent in stats.inplace_ops]
    assert filled == 16 * ["empty_like"]


class Twice(nn.Module):
    """One module is called twice in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.own = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.shared(self.shared(x))).square().sum()


def test_a_module_that_is_called_twice_is_kept() -> None:
    """The program has one line for a module, so only what runs once may be recomputed."""
    torch.manual_seed(0)
    model, sample = Twice(), torch.randn(64, 16)
    nodes = figures_of(model, sample).graph.name2node
    assert nodes["Twice.shared"]["is_leaf"]
    assert not nodes["Twice.own"]["is_leaf"]


class Silent(nn.Module):
    """Its second part makes no gradient, and its third calls nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.table = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).requires_grad_(False)
        self.none = nn.Sequential(nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.none(self.first(x) * self.table(x)).sum()


def test_modules_without_a_gradient_are_left_out() -> None:
    """PyTorch's aggregate fails at them: nothing in its figures stands for them."""
    model, sample = Silent(), torch.randn(8, 16)
    names = set(figures_of(model, sample).graph.name2node)
    assert {"Silent", "Silent.first"} <= names
    assert "Silent.table" not in names


class Hidden(nn.Module):
    """Its output is of a class that nobody looks into."""

    def forward(self, x: Tensor) -> Any:
        found = nn.functional.linear(x, torch.ones(1, 16, requires_grad=True)).sum()
        return type("Found", (), {"loss": found})()


def test_a_hidden_output_is_refused_by_name() -> None:
    """The trackers see no gradient enter the model, which their figures begin with."""
    model = nn.Module.__new__(Hidden)
    nn.Module.__init__(model)
    model.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="see no gradient enter Hidden"):
        figures_of(model, torch.randn(8, 16))


class Turning(Layer):
    """From some time on it calls another function."""

    other = False

    def forward(self, x: Tensor, scale: Tensor, *, flag: bool = True) -> Tensor:
        return super().forward(x.tanh() if self.other else x.sigmoid(), scale, flag=flag)


@needs_pulp
def test_another_path_than_was_seen_is_an_error() -> None:
    """Operators are told apart by number; a step with other ones is not recomputed wrongly."""
    model, sample = made(Stack, num_layers=4)
    model.layers = nn.ModuleList(Turning() for _ in range(4))
    with prepared(model, sample, int(0.8 * unplanned_bytes(model, sample))) as ready:
        assert wrapped(ready.model)
        ready.model(sample).backward()
        for layer in ready.model.layers:
            layer.other = True
        with pytest.raises(RuntimeError, match="calls tanh where its statistics saw sigmoid"):
            ready.model(sample)


def test_without_pulp_its_row_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program needs a package that is not among the dependencies."""
    model, sample = made(Stack)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    row = run_peer(PEER, model, sample, repeats=0, budget_bytes=10**6)
    assert row.measured is None
    assert 'pip install "remat-planner[peers]"' in row.error


@needs_pulp
def test_without_a_budget_its_row_asks_for_one() -> None:
    """It works towards a budget."""
    model, sample = made(Stack)
    row = run_peer(PEER, model, sample, repeats=0)
    assert (row.measured, row.outcome) == (None, RowOutcome.NOT_APPLICABLE)
    assert "needs a budget" in row.error


@needs_pulp
def test_a_budget_that_it_cannot_meet() -> None:
    """Its program says that nothing fits by its own reckoning; the row says what it was asked."""
    model, sample = made(Stack)
    row = run_peer(PEER, model, sample, repeats=0, budget_bytes=9_000, beside_bytes=1_000)
    assert (row.measured, row.outcome) == (None, RowOutcome.NOTHING_FOUND)
    assert "finds nothing within 8 kB (8000 bytes)" in row.error
    assert "1 kB that it does not count" in row.error


@needs_pulp
@pytest.mark.slow
def test_a_comparison_runs_it_at_each_budget() -> None:
    """A row for each budget, with eager's bits; one whose real peak is above the budget says so."""
    model, sample = made(Stack, num_layers=4)
    found = compare(
        model,
        sample,
        budgets=["90%", "80%"],
        strategies=["none"],
        peers=["sac_ilp"],
        optimizer="adamw",
        repeats=0,
        time_limit_s=1,
    )
    rows = [found.row("sac_ilp", budget) for budget in ("90%", "80%")]
    for row in rows:
        assert row.measured is not None, row.error
        assert row.measured.bits == "equal"
        assert "its program believes in" in row.note
        assert row.budget_bytes is not None
        over = row.measured.peak_bytes > row.budget_bytes
        assert row.outcome == (RowOutcome.OVER_BUDGET if over else RowOutcome.FOUND)
    assert rows[1].measured.peak_bytes < rows[0].measured.peak_bytes


@needs_pulp
def test_batch_norm_counts_twice() -> None:
    """As for every checkpoint: a recomputed batch norm moves its statistics again."""
    model, sample = made(Statistics)
    budget = int(0.7 * unplanned_bytes(model, sample))
    row = run_peer(PEER, model, sample, repeats=0, budget_bytes=budget)
    assert row.measured is not None, row.error
    assert row.measured.bits == "WRONG"
    assert "running" in row.measured.difference


@needs_pulp
@pytest.mark.slow
@pytest.mark.timeout(300)  # its program may take 180 s; at 80 % of T5's peak it does
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "vit", "t5"])
def test_models_of_the_zoo(name: str) -> None:
    """On five transformers it recomputes below eager's peak, with eager's bits, on two seeds."""
    case = ZOO[name]("small")
    model, sample = case.make(), case.sample(0)
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    unplanned = unplanned_bytes(model, sample)
    row = run_peer(PEER, model, sample, repeats=0, budget_bytes=int(0.7 * unplanned))
    assert row.measured is not None, row.error
    assert row.measured.bits == "equal", row.measured.difference
    assert row.measured.peak_bytes < measure(model, sample, repeats=0).peak_bytes
