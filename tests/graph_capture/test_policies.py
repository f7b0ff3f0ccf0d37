"""The user's own word on what is recomputed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.testing.bitwise import assert_same_training
from graph_capture.cost_graph import Operator
from graph_capture.errors import CaptureError
from graph_capture.policies import apply_policies, matches
from planner import optimize
from tests.capturing import capture_step

from .odd import WIDTH, ManyDropouts, Three, mean_square, normal


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("encoder.layer", True),
        ("encoder.layer.1.act", True),
        ("encoder.lay", False),
        ("*.act", True),
        ("*.dropout", False),
        ("aten.gelu", True),
        ("aten.gelu.default", True),
        ("aten.ge", False),
        ("aten.add_", True),
    ],
)
def test_patterns(pattern: str, expected: bool) -> None:
    """A path names what is below it, a glob matches the path, a call its name."""
    operator = Operator(
        name="x", target="aten.gelu.default+aten.add_.Tensor", module_path="encoder.layer.1.act"
    )
    assert matches(operator, pattern) is expected


def _x(seed: int = 0) -> torch.Tensor:
    return normal(seed, 16, WIDTH)


def test_never_is_pinned() -> None:
    """What is never to be recomputed is pinned, and nothing else is."""
    captured = capture_step(Three(), {"x": _x()}, loss=mean_square)
    graph = apply_policies(captured, never=["aten.gelu"]).graph
    changed = [
        b.target
        for a, b in zip(captured.graph.operators, graph.operators, strict=True)
        if a.pinned != b.pinned
    ]
    assert len(changed) == 2
    assert all("gelu" in target for target in changed)


def test_always_adds_a_repetition_before_backward_reads_it() -> None:
    """Each operator that is always recomputed appears once more, in backward."""
    captured = capture_step(Three(), {"x": _x()}, loss=mean_square)
    graph = apply_policies(captured, always=["aten.gelu"]).graph
    repeated = [op for op in graph.operators if op.name.endswith("_repeated")]
    assert len(repeated) == 2
    assert {op.phase for op in repeated} == {"backward"}


def test_never_and_always_keep_the_bits() -> None:
    """A plan with either policy trains to the same bits, dropout included."""
    torch.manual_seed(0)
    model = ManyDropouts()
    plan = optimize(
        model,
        _x(),
        budget_bytes=10**9,
        loss_fn=mean_square,
        always_recompute=["aten.elu", "alpha"],
        never_recompute=["b"],
        time_limit_s=1,
    )
    assert any(op.name.endswith("_repeated") for op in plan.graph.operators)
    assert_same_training(ManyDropouts, plan.apply, _x, loss_fn=mean_square)


class DrawnOver(Three):
    """Draws into what it has drawn: one operator, with one state of the generator."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x)) * torch.rand_like(x).bernoulli_(0.4).add_(1))


def test_draws_into_one_memory_follow_each_other_when_repeated() -> None:
    """The second goes on where the first ended, and not where it began."""
    plan = optimize(
        DrawnOver(),
        _x(),
        budget_bytes=10**9,
        loss_fn=mean_square,
        always_recompute=["aten.bernoulli_"],
        time_limit_s=1,
    )
    assert any(op.name.endswith("_repeated") for op in plan.graph.operators)
    assert_same_training(DrawnOver, plan.apply, _x, loss_fn=mean_square)


def test_always_frees_what_it_repeats() -> None:
    """Recomputing both activations always costs time and saves memory."""
    options = {"budget_bytes": 10**9, "loss_fn": mean_square, "time_limit_s": 1}
    plain = optimize(Three(), _x(), **options)
    always = optimize(Three(), _x(), always_recompute=["aten.gelu"], **options)
    assert always.predicted_step_us > plain.predicted_step_us
    assert always.predicted_peak_bytes <= plain.predicted_peak_bytes


@pytest.mark.parametrize("option", ["never", "always"])
def test_a_pattern_that_names_nothing_is_refused(option: str) -> None:
    """A pattern without a match is refused by its text."""
    captured = capture_step(Three(), {"x": _x()}, loss=mean_square)
    with pytest.raises(CaptureError, match="'attention', which is not a module path"):
        apply_policies(captured, **{option: ["attention"]})


def test_what_is_pinned_cannot_be_always_recomputed() -> None:
    """always_recompute of a pinned operator is refused with the reason of the pin."""

    class Chooses(Three):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values, chosen = self.a(x).topk(4)
            return self.b(x).gather(1, chosen) * values

    captured = capture_step(Chooses(), {"x": _x()}, loss=mean_square)
    with pytest.raises(CaptureError, match="its choice decides"):
        apply_policies(captured, always=["aten.topk"])
