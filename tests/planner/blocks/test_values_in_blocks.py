"""Blocks whose own code asks for values of what they are called with."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import BlockPlan, applied_blocks, measure, optimize
from planner.errors import OutcomeChangedError, PlanError, PlanWarning

LIMIT = 100.0


class Clamping(nn.Module):
    """A residual layer that clamps what is too large, as encoders do for half precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        x = x + self.dropout(self.down(hidden))
        if not torch.isfinite(x).all() or x.abs().max() > LIMIT:
            x = x.clamp(-LIMIT, LIMIT)
        return x


class Model(nn.Module):
    """Layers of one kind; the third one's values are too large."""

    def __init__(self, layer: Any = Clamping, width: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 5)
        self.layers = nn.ModuleList(layer(width) for _ in range(4))
        with torch.no_grad():
            self.layers[2].down.weight.mul_(3000)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden).square().mean()


def _model(layer: Any = Clamping) -> Model:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Model(layer).train()


def _x(scale: float = 1.0) -> Tensor:
    return torch.randn(256, 8, generator=torch.Generator().manual_seed(0)) * scale


def _planned(model: nn.Module, **options: Any) -> BlockPlan:
    options = {"budget": "80%", "time_limit_s": 0.4, "blocks": "layers.*", **options}
    plan = optimize(model, _x(), granularity="blocks", **options)
    assert isinstance(plan, BlockPlan)
    return plan


@cache
def _plan() -> BlockPlan:
    return _planned(_model())


def _steps(model: nn.Module, *scales: float) -> list[Tensor]:
    """Losses, gradients and generator states of some steps with an optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    found: list[Tensor] = []
    for step, scale in enumerate(scales):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = model(_x(scale))
        loss.backward()
        found += [loss.detach(), torch.get_rng_state()]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return found


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_each_block_is_planned_for_the_way_that_its_values_take() -> None:
    """Three layers of one kind share what is captured; the one that clamps has a plan apart."""
    parts = _plan().parts
    assert not parts.measured
    outcomes = {path: parts.of(path).outcomes for path in parts.plan_of}
    numbers = {path: [o.number for o in found] for path, found in outcomes.items()}
    assert numbers["layers.2"][-1] is True
    assert [numbers[f"layers.{i}"] for i in (0, 1)] == [[True, False]] * 2
    assert numbers["layers.3"][-1] is True  # its input lies at the limit already
    assert any(plan.schedule.recomputed() for plan in parts.plans)


def test_bits_and_peak_are_as_promised(tmp_path: Path) -> None:
    """Of the plan and of its file, over several steps."""
    _plan().save(tmp_path / "plan.json")
    planned = BlockPlan.load(tmp_path / "plan.json").apply(_model())
    assert _same(_steps(planned, 1.0, 1.0), _steps(_model(), 1.0, 1.0))
    applied = applied_blocks(planned)
    assert applied is not None
    assert (applied.planned_steps, applied.unplanned_steps) == (2, 0)
    measured = measure(_plan().apply(_model()), _x(), repeats=0)
    assert measured.peak_bytes <= _plan().predicted_peak_bytes <= _plan().budget_bytes
    assert _plan().predicted_peak_bytes - measured.peak_bytes <= 400


@pytest.mark.slow
def test_planning_leaves_the_model_as_it_was() -> None:
    """Parameters, gradients and generators, though its forward has run."""
    model = _model()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    _planned(model, time_limit_s=0.1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_another_answer_is_an_error_that_names_the_block_and_the_line() -> None:
    """And offers what a block can do about it."""
    planned = _plan().apply(_model())
    with pytest.raises(OutcomeChangedError) as caught:
        planned(_x(1000.0))
    said = str(caught.value)
    assert said.startswith("block 'layers.0': this step takes another way through the model")
    assert "test_values_in_blocks.py" in said
    assert "was False when the plan was made and is True now" in said
    assert "on_shape_change='unplanned'" in said
    assert "replan" not in said


def test_unplanned_blocks_have_eagers_bits_in_such_a_step() -> None:
    """With a warning; later steps go by the plan again."""
    planned = _plan().apply(_model(), on_shape_change="unplanned")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine = _steps(planned, 1.0, 1000.0, 1.0)
    assert _same(mine, _steps(_model(), 1.0, 1000.0, 1.0))
    assert {w.category for w in caught} == {PlanWarning}
    assert all("its budget of" in str(w.message) for w in caught)
    applied = applied_blocks(planned)
    assert applied is not None
    assert (applied.planned_steps, applied.unplanned_steps) == (2, 1)


class Drawing(Clamping):
    """Decides by numbers that it draws behind a dropout, whose rate is a value of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.rand_like(x).mul(x.detach().sign()).sum() > x.detach().sum() * 1e6:
            x = x * 2
        return super().forward(x)


@pytest.mark.slow
def test_what_a_block_draws_is_drawn_as_in_the_step() -> None:
    """The answer is that of the step: the generator stood where the blocks before had left it."""
    torch.manual_seed(5)
    model = _model(Drawing)
    plan = _planned(model, time_limit_s=0.1)
    planned = plan.apply(_model(Drawing), on_shape_change="unplanned")
    torch.manual_seed(5)
    mine = planned(_x())
    torch.manual_seed(5)
    assert torch.equal(mine, model(_x()))
    applied = applied_blocks(planned)
    assert applied is not None
    assert applied.unplanned_steps == 0


class Masked(Clamping):
    """Works on the rows that a mask picks."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.index_put(x, (mask,), super().forward(x[mask]))


class Masking(Model):
    """Gets the mask from the data, or from what it has computed."""

    computes = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        mask = (hidden if self.computes else x).sum(dim=-1) > 0
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.head(hidden).square().mean()


def _masking(computes: bool) -> Masking:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Masking(Masked).train()
    model.computes = computes
    return model


def test_shapes_may_depend_on_the_data() -> None:
    """As in plans of whole steps: a batch with as many rows in the mask runs by the plan."""
    planned = _planned(_masking(False), time_limit_s=0.1).apply(_masking(False))
    assert _same(_steps(planned, 1.0, 2.0), _steps(_masking(False), 1.0, 2.0))


def test_shapes_may_not_depend_on_what_other_modules_compute() -> None:
    """The plan would hold for one step."""
    with pytest.raises(PlanError, match=r"(?s)'layers\.0'.* a shape depends on values that the"):
        _planned(_masking(True))


def test_without_values_the_block_is_refused_with_both_reasons() -> None:
    """What it asks for, and why forward cannot run here."""
    with pytest.raises(PlanError, match=r"(?s)local_scalar_dense.*meta.*pass a real model"):
        optimize(
            _model().to("meta"), _x().to("meta"), budget="80%", granularity="blocks", blocks="l*.*"
        )


class Twice(nn.Module):
    """A layer with two results, the second of which nobody uses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Clamping(width)
        self.down = self.inner.down

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inner(x)
        return x, x.sum()


class First(Model):
    """Uses the first result of each layer."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden, _ = layer(hidden)
        return self.head(hidden).square().mean()


@pytest.mark.slow
def test_outputs_that_nobody_uses_are_found_beside_values() -> None:
    """The block is captured again without their gradients, by the same values."""

    def model() -> First:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return First(Twice).train()

    planned = _planned(model(), time_limit_s=0.1).apply(model())
    assert _same(_steps(planned, 1.0), _steps(model(), 1.0))
