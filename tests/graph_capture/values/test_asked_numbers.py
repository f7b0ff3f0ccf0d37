"""What ``.item()`` hands out while a step is traced."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_training
from graph_capture.captured_step import CapturedStep
from graph_capture.errors import CaptureError
from graph_capture.values.checks import expect_number
from planner import optimize
from tests.capturing import capture_step

Ask = Callable[["Model", Tensor, Tensor], Any]
WIDTH = 8


class Model(nn.Module):
    """A layer, a counter, and a forward that is given."""

    count: Tensor
    last: Any

    def __init__(self, ask: Ask) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.last = 0.0
        self.ask = ask

    def forward(self, x: Tensor, ids: Tensor) -> Any:
        return self.ask(self, x, ids)


def sample(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, WIDTH, generator=generator)
    return x, torch.randint(1, 6, (6,), generator=generator)


def first(output: Any) -> Tensor:
    """The loss: of the first tensor in an output."""
    tensors = [output] if isinstance(output, Tensor) else list(output)
    return next(t for t in tensors if isinstance(t, Tensor)).square().mean()


def capture(ask: Ask, ids: Tensor | None = None) -> CapturedStep:
    arguments = {"x": sample(0)[0], "ids": sample(0)[1] if ids is None else ids}
    return capture_step(Model(ask), arguments, loss=first, measure_scratch=False)


def checked(captured: CapturedStep) -> list[Any]:
    """Planned answers of the checks, in order."""
    nodes = captured.step.graph.nodes
    return [n.args[1] for n in nodes if n.target is expect_number]


def trains_alike(ask: Ask) -> None:
    """Three steps with other values are eager's, by one plan."""
    torch.manual_seed(0)
    plan = optimize(
        Model(ask).train(), sample(0), budget_bytes=10**9, loss_fn=first, time_limit_s=1
    )
    assert_same_training(lambda: Model(ask).train(), plan.apply, sample, loss_fn=first)


def counting(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    seen = m.count.item()
    m.count += 1
    return m.layer(x * 2 if seen > 100 else x)


@pytest.mark.parametrize(
    ("ask", "answers"),
    [
        (lambda m, x, ids: m.layer(x) * (2 if ids.max().item() >= 9 else 3), [False]),
        (lambda m, x, ids: m.layer(x * (m.layer(x).abs().max().item() < 1e4)), [True]),
        (lambda m, x, ids: m.layer(x) if torch.rand(1).item() < 2 else x, [True]),
        (lambda m, x, ids: m.layer(x if x.min().item() < x.max().item() else -x), [True]),
        (lambda m, x, ids: m.layer(x if ids.sum().item() else -x), [True]),
        (counting, [False]),
    ],
)
def test_a_number_that_is_compared_is_planned_by_the_answer(ask: Ask, answers: list[bool]) -> None:
    """The next step has another number and the same answer."""
    assert checked(capture(ask)) == answers
    trains_alike(ask)


@pytest.mark.parametrize(("number", "above"), [(0.1, True), (0.125, False)])
def test_numbers_are_compared_as_python_compares(number: float, above: bool) -> None:
    """A float32 is not compared with a rounded float64: 0.1 in float32 is more than 0.1."""
    captured = capture(
        lambda m, x, ids: m.layer(x) * (2 if ids.item() > number else 3), torch.tensor(number)
    )
    assert checked(captured) == [above]


def logging(m: Model, x: Tensor, ids: Tensor) -> Any:
    out = m.layer(x)
    m.last = out.mean().item()
    return out.max().item(), out, {"positive": (out > 0).sum().item()}


def test_numbers_that_are_handed_on_are_those_of_each_step() -> None:
    """A number that is returned or left in an attribute is no question."""
    captured = capture(logging)
    assert not captured.step.checks
    trains_alike(logging)
    torch.manual_seed(0)
    model, twin = Model(logging).train(), Model(logging).train()
    twin.load_state_dict(model.state_dict())
    optimize(model, sample(0), budget_bytes=10**9, loss_fn=first, time_limit_s=1).apply(model)
    model(*sample(5))
    twin(*sample(5))
    assert type(model.last) is float
    assert model.last == twin.last


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, x, ids: m.layer(x)[: ids[0].item()],
        lambda m, x, ids: m.layer(x).narrow(0, 0, ids[0].item()),
        lambda m, x, ids: m.layer(x) / ids[0].item(),
        lambda m, x, ids: torch.add(m.layer(x), 1, alpha=ids[0].item()),
        lambda m, x, ids: m.layer(x) * {f"{i}": i for i in range(9)}[f"{ids[0].item()}"],
    ],
)
def test_a_number_that_is_computed_with_is_planned_by_its_value(ask: Ask) -> None:
    """Where only the number itself will do."""
    assert set(checked(capture(ask))) == {int(sample(0)[1][0])}


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, x, ids: m.layer(x) * m.layer(x).mean().item(),
        lambda m, x, ids: m.layer(x * math.exp(m.layer(x).mean().item())),
        lambda m, x, ids: (m.layer(x), round(m.layer(x).mean().item(), 2)),
    ],
)
def test_computing_with_a_number_of_the_step_is_refused(ask: Ask) -> None:
    """Each step would need a plan of its own."""
    with pytest.raises(CaptureError, match=r"return them \(x or x.item\(\)\)"):
        capture(ask)


def test_a_number_written_into_a_text_is_said() -> None:
    """Planned steps write no log."""

    def ask(m: Model, x: Tensor, ids: Tensor) -> Tensor:
        out = m.layer(x)
        assert f"{out.mean().item():.2f} {out.mean():.2f}" == "nan nan"
        return out

    with pytest.warns(UserWarning, match="planned steps write nothing"):
        capture(ask)


def test_a_number_is_one_to_the_model() -> None:
    """It is an int or a float where the code asks for its type."""

    def ask(m: Model, x: Tensor, ids: Tensor) -> Tensor:
        whole, broken = ids[0].item(), x.mean().item()
        assert isinstance(whole, int)
        assert not isinstance(whole, float)
        assert isinstance(broken, float)
        return m.layer(x)

    capture(ask)
