"""Models that cannot be captured whole: their blocks are planned, the rest is measured."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graph_capture.errors import CaptureError
from planner import BlockPlan, PlanError, applied_blocks, measure, optimize

from .small_blocks import Layer


class Branching(nn.Module):
    """A value decides a branch between its blocks, another one a shape."""

    def __init__(self, width: int = 16, num_layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layers = nn.ModuleList(Layer(width, i) for i in range(num_layers))
        self.norm = nn.BatchNorm1d(width)
        self.extra, self.head = nn.Linear(width, width), nn.Linear(width, 5)
        self.dropout = nn.Dropout(0.1)
        self.num_calls = 0
        self.branches: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        hidden = self.norm(self.embed(x))
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, scale=0.5)
            if i == 1:
                mean = float(x.mean())
                scale = hidden.detach().std().item() * 2.0
                self.branches.append(mean > 0)
                if mean > 0:
                    hidden = hidden + self.dropout(torch.tanh(self.extra(hidden))) * scale
                norms = hidden.detach().norm(dim=-1)
                longest = hidden[norms > norms.median()]
                hidden = hidden + longest.mean(dim=0)
        return self.head(hidden)


def matched(output: Tensor) -> Tensor:
    """A loss over the pairs that a matcher outside of PyTorch chooses."""
    costs = -output[:20].softmax(-1).detach().numpy()
    rows, columns = map(torch.as_tensor, linear_sum_assignment(costs))
    return -output.log_softmax(-1)[rows, columns].mean() + output.square().mean()


def _model(build: Any = Branching) -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return build().train()


def _x(sign: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(256, 8, generator=generator) + sign


def _planned(model: nn.Module, budget: str = "70%", **options: Any) -> BlockPlan:
    options = {"loss_fn": matched, "time_limit_s": 1.0, "blocks": "layers.*", **options}
    plan = optimize(model, _x(), budget=budget, granularity="blocks", **options)
    assert isinstance(plan, BlockPlan)
    return plan


@cache
def _plan() -> BlockPlan:
    return _planned(_model())


def _steps(model: nn.Module, signs: tuple[float, ...]) -> list[Tensor]:
    """Losses, gradients, buffers and generator states of some steps with an optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found: list[Tensor] = []
    for step, sign in enumerate(signs):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = matched(model(_x(sign, step)))
        loss.backward()
        found += [loss.detach(), torch.get_rng_state(), *map(torch.clone, model.buffers())]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return found


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_the_whole_step_is_refused_and_blocks_are_offered() -> None:
    """By the argument that plans them."""
    with pytest.raises(CaptureError, match="captured") as caught:
        optimize(_model(), _x(), loss_fn=matched, budget="70%")
    assert any("granularity='blocks'" in note for note in caught.value.__notes__)


def test_the_rest_is_said_to_be_measured() -> None:
    """In the parts and in words; no plan of the whole step is spoken of."""
    plan = _plan()
    assert plan.parts.measured
    assert plan.parts.whole is None
    assert "measured in a real step" in str(plan)
    assert plan.blocks == ("layers.0", "layers.1", "layers.2", "layers.3")
    assert any(part.schedule.recomputed() for part in plan.parts.plans)


def test_the_measured_peak_is_the_predicted_one() -> None:
    """But for what autograd may save of two numbers; and so below the budget."""
    plan = _plan()
    measured = measure(plan.apply(_model()), _x(), loss_fn=matched, repeats=0)
    assert measured.peak_bytes <= plan.predicted_peak_bytes <= plan.budget_bytes
    assert plan.predicted_peak_bytes - measured.peak_bytes <= 32


def test_the_unplanned_peak_is_predicted() -> None:
    """But for numbers that blocks hold."""
    measured = measure(_model(), _x(), loss_fn=matched, repeats=0)
    assert _plan().baseline_peak_bytes == pytest.approx(measured.peak_bytes, abs=128)


def test_bits_are_eagers_whatever_way_the_rest_takes() -> None:
    """Several steps with dropout and batch norm, some of them through the other branch."""
    signs = (1.0, -1.0, 1.0, -1.0)
    planned, eager = _plan().apply(_model()), _model()
    assert _same(_steps(planned, signs), _steps(eager, signs))
    assert planned.branches == eager.branches == [True, False, True, False]
    applied = applied_blocks(planned)
    assert applied is not None
    assert (applied.planned_steps, applied.unplanned_steps) == (4, 0)


def test_planning_leaves_the_model_as_it_was() -> None:
    """Parameters, buffers, gradients, attributes, modes, hooks, generators, the input."""
    model, x = _model(), _x().requires_grad_()
    x.grad = torch.ones_like(x)
    model.layers[0].dropout.eval()
    called: list[Any] = []
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
        p.register_hook(called.append)
        p.register_post_accumulate_grad_hook(called.append)
    objects = {name: (id(p), id(p.grad)) for name, p in model.named_parameters()}
    values = {name: t.clone() for name, t in model.state_dict().items()}
    holds = {path: set(vars(m)) for path, m in model.named_modules()}
    modes = [m.training for m in model.modules()]
    hooks = [len(p._backward_hooks) for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    plan = optimize(model, x, loss_fn=matched, budget="80%", granularity="blocks", time_limit_s=0.3)
    assert isinstance(plan, BlockPlan)
    assert plan.parts.measured
    assert not called
    assert objects == {name: (id(p), id(p.grad)) for name, p in model.named_parameters()}
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    assert holds == {path: set(vars(m)) for path, m in model.named_modules()}
    assert (model.num_calls, model.branches) == (0, [])
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(p._backward_hooks) for p in model.parameters()]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert torch.equal(x, _x())
    assert torch.equal(x.grad, torch.ones_like(x))


class Writes(Branching):
    """Writes to its parameters and buffers in forward, and through NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("seen", torch.zeros(3))
        self.memory = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.bias.clamp_(-0.01, 0.01)
            self.count += 1
            self.memory += 1
            self.seen.numpy()[0] += 1
        return super().forward(x)


def test_what_forward_writes_is_put_back() -> None:
    """Parameters, buffers and other tensors, however they are written to."""
    model = _model(Writes)
    before = copy.deepcopy(model.state_dict())
    _planned(model, "90%", time_limit_s=0.3)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model.memory, torch.zeros(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"outputs": "released"},
        {"grads": "accumulated"},
        {"optimizer": "adamw"},
        {"resident_bytes": 10_000},
    ],
    ids=["released", "accumulated", "optimizer", "resident"],
)
def test_what_the_loop_holds_is_counted(options: dict[str, Any], tmp_path: Any) -> None:
    """The allocator finds no more than was predicted, and little less; the file says it, too."""
    plan = _planned(_model(), "80%", **options, time_limit_s=0.3)
    plan.save(tmp_path / "plan.json")
    loaded = BlockPlan.load(tmp_path / "plan.json")
    assert loaded.holds == plan.holds
    measured = measure(plan.apply(_model()), _x(), loss_fn=matched, repeats=0, **options)
    assert measured.peak_bytes <= plan.predicted_peak_bytes <= plan.budget_bytes
    assert plan.predicted_peak_bytes - measured.peak_bytes <= 400


def test_a_file_says_that_the_rest_was_measured(tmp_path: Any) -> None:
    """It loads to the same parts, and trains with the same bits."""
    _plan().save(tmp_path / "plan.json")
    loaded = BlockPlan.load(tmp_path / "plan.json")
    assert loaded.parts == _plan().parts
    assert loaded.parts.measured
    assert _same(_steps(loaded.apply(_model()), (1.0, -1.0)), _steps(_model(), (1.0, -1.0)))


@pytest.mark.parametrize("where", ["model", "sample", "device"])
def test_a_step_that_cannot_run_is_refused(where: str) -> None:
    """Real tensors on the device are needed, and the error says so."""
    model, x = _model(), _x()
    if where == "model":
        model = model.to("meta")
    if where != "device":
        x = x.to("meta")
    device = "h100" if where == "device" else None
    with pytest.raises(CaptureError, match=r"one step would have to be run for real, and .* real"):
        optimize(model, x, loss_fn=matched, budget="80%", granularity="blocks", device=device)


class Draws(Branching):
    """Draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numpy = np.random.default_rng(0)
        self.torch = torch.Generator().manual_seed(0)
        self.counts = np.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.counts[0] += 1
        factor = 1 + self.numpy.random()
        return super().forward(x + torch.rand(8, generator=self.torch)) * factor


def test_generators_of_the_model_are_put_back() -> None:
    """So that the first step draws what it would have drawn, and arrays are as they were."""
    model = _model(Draws)
    _planned(model, "90%", time_limit_s=0.3)
    assert model.numpy.random() == np.random.default_rng(0).random()
    fresh = torch.Generator().manual_seed(0)
    assert torch.equal(torch.rand(9, generator=model.torch), torch.rand(9, generator=fresh))
    assert model.counts.tolist() == [0, 0]


class Fails(Branching):
    """Does not run at all."""

    def forward(self, x: Tensor) -> Tensor:
        if super().forward(x).mean().item() < 10:
            raise KeyError("nothing to see")
        return x


def test_a_step_that_fails_for_real_is_named_with_its_error() -> None:
    """Beside the reason why the step cannot be captured."""
    with pytest.raises(CaptureError, match=r"real step .* fails: KeyError: 'nothing to see'"):
        _planned(_model(Fails))


class Checkpointed(Branching):
    """Checkpoints one of its blocks behind the value."""

    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers[0](self.embed(x))
        hidden = hidden * (hidden.detach().std().item() * 2.0)
        hidden = checkpoint(self.layers[1], hidden, use_reentrant=self.use_reentrant)
        return self.head(self.layers[3](self.layers[2](hidden)))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_a_checkpointed_block_is_refused_by_name(use_reentrant: bool) -> None:
    """Though the step runs for real, in which a checkpoint is one."""
    model = _model(Checkpointed)
    model.use_reentrant = use_reentrant
    with pytest.raises(PlanError, match=r"'layers\.1' is called by torch\.utils\.checkpoint"):
        _planned(model)


class WritesToBlock(Branching):
    """Writes in place to what a block returns."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers[0](self.embed(x))
        hidden = hidden * (hidden.detach().std().item() * 2.0)
        hidden = self.layers[1](hidden).mul_(2)
        return self.head(self.layers[3](self.layers[2](hidden)))


def test_a_block_whose_output_is_written_to_is_refused() -> None:
    """A plan inside would not see the write."""
    with pytest.raises(PlanError, match=r"writes in place to what block 'layers\.1' returns"):
        _planned(_model(WritesToBlock))


class Regions(Branching):
    """Its last blocks run in an autocast region that forward opens."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers[1](self.layers[0](self.embed(x)))
        hidden = hidden * (hidden.detach().std().item() * 2.0)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.layers[3](self.layers[2](hidden))
        return self.head(hidden.float())


@pytest.mark.slow
def test_blocks_in_regions_of_autocast_have_eagers_bits() -> None:
    """The step that was run for real noted the autocast of each call."""
    plan = _planned(_model(Regions), "85%", time_limit_s=0.3)
    assert [plan.parts.of(path).guard.autocast for path in plan.blocks] == [
        None,
        None,
        "bfloat16",
        "bfloat16",
    ]
    planned = plan.apply(_model(Regions))
    assert _same(_steps(planned, (1.0, -1.0)), _steps(_model(Regions), (1.0, -1.0)))


class Experts(nn.Module):
    """A layer with attention, and experts that each get the rows routed to them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attention = _Attention(width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.router = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        routed, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (routed == i).nonzero(as_tuple=True)
            out = out.index_put(rows, expert(x[rows]))
        return x + out


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.dropout = nn.Linear(width, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(self.norm(x)).chunk(3, dim=-1)
        return self.dropout(self.out(torch.softmax(q @ k.mT / 4, -1) @ v))


class Routed(nn.Module):
    """Layers with experts, whose attention can be planned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Experts() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


@pytest.mark.slow
def test_auto_divides_layers_whose_experts_cannot_be_planned() -> None:
    """The attention of each is a block, and the peak is what was predicted."""
    x = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0))
    plan = optimize(_model(Routed), x, budget="80%", granularity="blocks", time_limit_s=1)
    assert isinstance(plan, BlockPlan)
    assert plan.parts.measured
    assert plan.blocks == tuple(f"layers.{i}.attention" for i in range(4))
    planned = plan.apply(_model(Routed))
    measured = measure(planned, x, repeats=0)
    assert measured.peak_bytes <= plan.predicted_peak_bytes <= plan.budget_bytes
    assert plan.predicted_peak_bytes - measured.peak_bytes <= 1_000
