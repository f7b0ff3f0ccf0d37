"""Peers recompute what they say, leave the model alone, and tell why they cannot run."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.zoo import ZOO
from graph_capture import capture
from graph_capture.folding.reuse import ReuseFinder
from planner import Plan, measure, optimize
from planner.comparing.execution.run_peer import release, run_peer
from planner.comparing.peers import PEERS, Peer, Ready, Situation, blocks_of, compile_peer
from solvers.strategies import STRATEGIES, apply_strategy
from tests.planner.comparing.peers.peer_models import (
    Stack,
    Statistics,
    calls_of_step,
    made,
)

CHECKPOINTS = ["checkpoint_per_block", "checkpoint_sqrt", "sac_save_matmuls"]
BLOCKS = tuple(f"layers.{i}" for i in range(9))


@contextlib.contextmanager
def prepared(
    name: str, model: nn.Module, sample: object, blocks: tuple[str, ...] = BLOCKS
) -> Iterator[Ready]:
    """A copy of a model that trains by a peer."""
    situation = Situation(
        sample_input=sample, loss_fn=None, device=torch.device("cpu"), blocks=lambda: blocks
    )
    with PEERS[name].prepare(copy.deepcopy(model), situation) as ready:
        yield ready


@pytest.mark.parametrize(
    ("name", "products", "sines"),
    [
        ("checkpoint_per_block", 9, 9),
        ("checkpoint_sqrt", 6, 6),  # three segments of three, the last one kept
        ("sac_save_matmuls", 0, 9),
    ],
)
def test_what_runs_again(name: str, products: int, sines: int) -> None:
    """Of nine blocks' matrix products and sines, as many run again as the peer does not save."""
    model, sample = made(Stack)
    plain = calls_of_step(model, sample)
    with prepared(name, model, sample) as ready:
        calls = calls_of_step(ready.model, sample)
    # Early stop: the last call of a block whose output is not saved does not run again.
    assert calls["addmm"] - plain["addmm"] == products
    assert calls["sin"] - plain["sin"] == sines


@pytest.mark.parametrize("name", [*CHECKPOINTS, "compile_budget_1.0"])
def test_a_peer_computes_the_same(name: str) -> None:
    """Loss, gradients and random state of four steps are eager's, dropout active."""
    model, sample = made(Stack)
    row = run_peer(PEERS[name], model, sample, repeats=2, optimizer="sgd", blocks=BLOCKS)
    assert row.error == ""
    assert row.kind == "peer"
    assert row.measured is not None
    assert row.measured.bits in ("equal", "right"), row.measured.difference
    assert row.measured.bits == "equal" or name.startswith("compile")
    assert row.measured.num_pairs == 2
    assert row.measured.ratio > 0


@pytest.mark.slow
def test_peaks_are_in_the_order_of_what_is_saved() -> None:
    """Per block below selective below eager; the optimizer's state counts."""
    model, sample = made(Stack)
    sample = sample.repeat(64, 1)
    peaks = {}
    for name in CHECKPOINTS:
        row = run_peer(PEERS[name], model, sample, repeats=0, optimizer="adamw", blocks=BLOCKS)
        assert row.measured is not None, row.error
        peaks[name] = row.measured.peak_bytes
        assert row.measured.num_pairs == 0
    eager = measure(model, sample, optimizer="adamw", repeats=0).peak_bytes
    assert peaks["checkpoint_per_block"] < peaks["sac_save_matmuls"] < eager
    assert peaks["checkpoint_sqrt"] < eager


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_model_is_not_touched(name: str) -> None:
    """Values, gradients, hooks, attributes, class and optimizer are what they were."""
    model, sample = made(Stack)
    optimizer = torch.optim.AdamW(model.parameters())
    model(sample).backward()
    optimizer.step()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    gradients = {n: p.grad for n, p in model.named_parameters()}
    values = {n: None if g is None else g.clone() for n, g in gradients.items()}
    states = copy.deepcopy(optimizer.state_dict())
    attributes = [dict(vars(m)) for m in model.modules()]
    generator = torch.get_rng_state()
    row = run_peer(PEERS[name], model, sample, optimizer=optimizer, repeats=1, blocks=BLOCKS)
    assert row.error == ""
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    for n, p in model.named_parameters():
        assert p.grad is gradients[n]
        assert p.grad is None or torch.equal(p.grad, values[n])
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert all("forward" not in vars(m) for m in model.modules())
    assert torch.equal(generator, torch.get_rng_state())
    after = optimizer.state_dict()["state"]
    assert all(
        torch.equal(state["exp_avg"], after[i]["exp_avg"]) and state["step"] == after[i]["step"]
        for i, state in states["state"].items()
    )


class Full(Stack):
    """Eager's step has no room; a peer's twin has."""

    full = True

    def forward(self, x: Tensor) -> Tensor:
        loss = super().forward(x)
        if self.full:
            loss.register_hook(lambda g: self.fail())
        return loss

    def fail(self) -> None:
        raise torch.OutOfMemoryError("out of memory in the backward pass")


@contextlib.contextmanager
def with_room(twin: nn.Module, situation: Situation) -> Iterator[Ready]:
    """A peer that needs less memory than eager."""
    twin.full = False
    yield Ready(model=twin)


def test_gradients_survive_an_eager_step_that_has_no_room() -> None:
    """The user's gradients are the same objects with the same values."""
    model, sample = made(Full, num_layers=2)
    gradients = []
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
        gradients.append(p.grad)
    row = run_peer(Peer(name="p", summary="", source="", prepare=with_room), model, sample)
    assert row.measured is not None, row.error
    assert row.measured.difference == "eager runs out of memory"
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient
        assert (gradient == 7).all()


@pytest.mark.parametrize("fails", [False, True])
def test_a_twin_is_gone_before_memory_is_released(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the next figure starts from holds no model of this peer's, failed or not."""
    model, sample = made(Stack, num_layers=2)
    twins: list[weakref.ref[nn.Module]] = []
    alive: list[bool] = []

    @contextlib.contextmanager
    def noting(twin: nn.Module, situation: Situation) -> Iterator[Ready]:
        twins.append(weakref.ref(twin))
        if fails:
            raise RuntimeError("no")
        yield Ready(model=twin)

    def looking(device: torch.device) -> None:
        release(device)
        alive.append(twins[0]() is not None)

    monkeypatch.setattr("planner.comparing.execution.run_peer.release", looking)
    peer = Peer(name="p", summary="", source="", prepare=noting)
    assert bool(run_peer(peer, model, sample, repeats=0, num_seeds=1).error) == fails
    assert not alive[-1]


def test_batch_norm_twice_is_wrong() -> None:
    """Checkpointed batch norm moves its running statistics twice; the row names the buffer."""
    model, sample = made(Statistics)
    row = run_peer(PEERS["checkpoint_per_block"], model, sample, repeats=0)
    assert row.measured is not None
    assert row.measured.bits == "WRONG"
    assert "buffer layers." in row.measured.difference


def test_an_applied_plan_takes_no_part() -> None:
    """The peer and eager run the model's own forward; the plan is applied afterwards."""
    model, sample = made(Statistics)
    optimize(model, sample, budget_gb=1).apply(model)
    seen = []

    @contextlib.contextmanager
    def looking(twin: nn.Module, situation: Situation) -> Iterator[Ready]:
        seen.append("forward" in vars(twin))
        yield Ready(model=twin)

    row = run_peer(Peer(name="p", summary="", source="", prepare=looking), model, sample, repeats=1)
    assert row.measured is not None
    assert row.measured.bits == "equal"
    assert seen == [False]
    Plan.remove(model)


def test_what_fails_is_in_the_row() -> None:
    """An error while preparing or while running leaves its first line."""
    model, sample = made(Stack)

    @contextlib.contextmanager
    def broken(twin: nn.Module, situation: Situation) -> Iterator[Ready]:
        raise RuntimeError("no compiler here\nlong story")
        yield

    row = run_peer(Peer(name="p", summary="", source="", prepare=broken), model, sample)
    assert (row.error, row.measured) == ("RuntimeError: no compiler here", None)
    row = run_peer(PEERS["gradient_checkpointing_enable"], model, sample)
    assert "is no model of Transformers" in row.error
    with pytest.raises(ValueError, match="from 0 to 1"):
        compile_peer(2)


def test_transformers_refuses_a_resnet() -> None:
    """Its own words are in the row."""
    case = ZOO["resnet50"]("tiny")
    row = run_peer(PEERS["gradient_checkpointing_enable"], case.make(), case.sample(0))
    assert "does not support" in row.error
    assert row.measured is None


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("t5", ["encoder.block.0", "decoder.block.0"]),
        ("resnet50", [f"resnet.encoder.stages.{s}.layers.{b}" for s in (0, 1) for b in (0, 1)]),
    ],
)
def test_blocks_of_models(model: str, names: list[str]) -> None:
    """Layers of a transformer, both stacks of T5, blocks of a ResNet's stages."""
    case = ZOO[model]("tiny")
    assert list(blocks_of(case.make(), case.sample(0), case.loss_fn)) == names


def test_gpt2_with_a_cache_is_run_without_it() -> None:
    """A block that runs twice would fill the cache twice; the row says that it was switched off."""
    case = ZOO["gpt2"]("tiny")
    model, sample = case.make(), case.sample(0)
    row = run_peer(PEERS["checkpoint_per_block"], model, sample, repeats=0)
    assert row.measured is not None, row.error
    assert row.measured.bits == "equal"
    assert "use_cache=False" in row.note
    assert "peaks are not comparable" in row.note
    assert model.config.use_cache


@pytest.mark.parametrize(
    ("peer", "strategy"),
    [
        ("gradient_checkpointing_enable", "transformers_per_layer"),
        ("sac_save_matmuls", "save_matmuls_per_block"),
    ],
)
def test_a_peer_peaks_where_its_strategy_is_replayed(
    peer: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured is predicted, where the planner does not write over dead arguments either.

    PyTorch's tools allocate each result beside its arguments. A captured step may write
    over an argument that nobody else reads, so a strategy's peak may be lower than its peer's.
    """
    case = ZOO["bert"]("tiny")
    model, sample = case.make(), case.sample(0)
    model.config.use_cache = False
    with_reuse = apply_strategy(STRATEGIES[strategy], capture(model, sample)).peak_bytes
    monkeypatch.setattr(ReuseFinder, "candidates", lambda self, node: [])
    predicted = apply_strategy(STRATEGIES[strategy], capture(model, sample)).peak_bytes
    row = run_peer(PEERS[peer], model, sample, repeats=0, num_seeds=1)
    assert row.measured is not None, row.error
    assert with_reuse < 0.98 * predicted
    # A random state of 5 kB is held for each dropout here, one for each block there.
    assert row.measured.peak_bytes == pytest.approx(predicted, rel=0.01)
