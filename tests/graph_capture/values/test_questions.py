"""Values that forward asks for: answered on the sample, and checked in each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_capture.captured_step import CapturedStep
from graph_capture.errors import CaptureError
from graph_capture.tracing.traced_step import TakenPath
from graph_capture.values.before_checks import before_checks
from graph_capture.values.checks import OutcomeChanged, expect_number, expect_shape, expect_values
from graph_capture.values.outcomes import Outcome, OutcomeMismatchError
from tests.capturing import capture_step

Forward = Callable[[Any, Tensor, Tensor], Tensor]
IDS = torch.tensor([0, 1, 2, 0, 5, 0])


class Asking(nn.Module):
    """A layer with a buffer and a normalization, and a forward that is given."""

    count: Tensor

    def __init__(self, ask: Forward) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.ask = ask

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.ask(self, x, ids)


def capture(ask: Forward, ids: Tensor = IDS, **options: Any) -> CapturedStep:
    x = torch.linspace(-1, 1, 24).reshape(6, 4)
    return capture_step(
        Asking(ask),
        {"x": x, "ids": ids},
        loss=lambda output: output.square().sum(),
        measure_scratch=False,
        **options,
    )


def checks_of(captured: CapturedStep) -> list[Any]:
    """Operators and planned values of the checks, in order."""
    found = []
    for node in captured.step.graph.nodes:
        if getattr(node.target, "namespace", "") == "remat":
            found.append((node.target, node.args[1]))
    return found


def test_an_assertion_about_an_input_is_checked_by_its_outcome() -> None:
    """What is planned for is that the comparison is false, not what the labels are."""

    def ask(model: Asking, x: Tensor, ids: Tensor) -> Tensor:
        if ids.max() >= 10:
            raise ValueError("out of range")
        return model.layer(x)

    captured = capture(ask)
    assert checks_of(captured) == [(expect_number, False)]
    assert not captured.step.branch_free
    assert "test_questions.py:" in captured.step.checks[0].source


def test_the_branch_of_finite_activations_is_eagers() -> None:
    """A branch on an activation is the one that the sample's activations take."""

    def ask(model: Asking, x: Tensor, ids: Tensor) -> Tensor:
        h = model.layer(x)
        return h if torch.isfinite(h).all() else h.clamp(-1, 1)

    captured = capture(ask)
    assert checks_of(captured) == [(expect_number, True)]
    assert not any("clamp" in op.target for op in captured.graph.operators)


@pytest.mark.parametrize(
    ("ask", "shape"),
    [
        (lambda m, x, ids: m.layer(x)[ids != 0], [3, 4]),
        (lambda m, x, ids: m.layer(x[ids != 0]), [3, 4]),
        (lambda m, x, ids: m.layer(x)[ids.nonzero().squeeze(1)], [3, 1]),
        (lambda m, x, ids: m.layer(x)[torch.unique(ids)], [4]),
        (lambda m, x, ids: m.layer(x).masked_select(ids[:, None] == 0), [12]),
        (lambda m, x, ids: m.layer(x).repeat_interleave(ids, 0), [8]),
        (lambda m, x, ids: m.layer(x)[:, :1] * torch.bincount(ids), [6]),
    ],
)
def test_sizes_that_inputs_decide_are_the_samples(ask: Forward, shape: list[int]) -> None:
    """Masks, indices and counts of an input make the shapes that they make on the sample."""
    assert checks_of(capture(ask)) == [(expect_shape, shape)]


def test_a_list_is_one_question() -> None:
    """``.tolist()`` of a tensor is checked as a whole."""
    captured = capture(lambda m, x, ids: m.layer(x)[[i for i in ids.tolist() if i]])
    assert [target for target, _ in checks_of(captured)] == [expect_values]
    assert captured.step.outcomes == (Outcome(values=(0, 1, 2, 0, 5, 0)),)


@pytest.mark.parametrize(
    "split",
    [
        lambda h, places: torch.tensor_split(h, places),
        lambda h, places: h.tensor_split(places, dim=0),
        lambda h, places: h.tensor_split(tensor_indices_or_sections=places),
    ],
)
def test_places_of_a_split_are_one_question(split: Any) -> None:
    """``tensor_split`` by a tensor reads it as a whole."""
    captured = capture(lambda m, x, ids: split(m.layer(x), ids[1:3])[1])
    assert [target for target, _ in checks_of(captured)] == [expect_values]


def test_numpy_sees_the_samples_integers() -> None:
    """``.numpy()`` of an input hands out its values, and one check sees that they stay."""
    captured = capture(lambda m, x, ids: m.layer(x) * float(ids.cpu().numpy().sum()))
    assert [target for target, _ in checks_of(captured)] == [expect_values]


def test_shapes_that_activations_decide_are_refused() -> None:
    """A mask made of activations is another one in each step; the error says what works."""
    with pytest.raises(CaptureError, match="plan the blocks around"):
        capture(lambda m, x, ids: m.layer(x)[m.layer(x)[:, 0] > 0])


def test_counts_of_activations_are_planned_where_their_number_is_given() -> None:
    """``bincount`` with ``minlength`` makes so many counts unless an index is out of range."""

    def ask(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        hidden = m.layer(x)
        return hidden * torch.bincount(hidden.argmax(-1), minlength=4)

    assert checks_of(capture(ask)) == [(expect_shape, [4])]
    with pytest.raises(CaptureError, match="a shape depends on values"):
        capture(lambda m, x, ids: m.layer(x).sum() * torch.bincount(m.layer(x).argmax(-1)))


def test_shapes_that_are_drawn_are_refused() -> None:
    """So is a mask of random numbers."""
    with pytest.raises(CaptureError, match="computes or draws"):
        capture(lambda m, x, ids: m.layer(x)[torch.rand(6) < 0.5])


def test_numbers_read_out_of_activations_are_refused_with_what_works() -> None:
    """A number of an activation is refused; the comparison that the error names is planned."""
    with pytest.raises(CaptureError, match="if x > 0"):
        capture(lambda m, x, ids: m.layer(x) * 2 if float(m.layer(x).sum()) > 0 else m.layer(x))
    capture(lambda m, x, ids: m.layer(x) * 2 if m.layer(x).sum() > 0 else m.layer(x))


def test_a_count_that_forward_increases_is_refused() -> None:
    """A number of steps read out of a buffer is another one in the next step."""
    norm = nn.BatchNorm1d(4, momentum=None)
    sample = {"input": torch.randn(6, 4)}
    with pytest.raises(CaptureError, match="give momentum a number"):
        capture_step(norm, sample, loss=lambda y: y.sum(), measure_scratch=False)


def test_a_write_before_the_question_is_seen() -> None:
    """A buffer that forward has written to has its new value, and the model keeps the old."""

    def ask(model: Asking, x: Tensor, ids: Tensor) -> Tensor:
        model.count.add_(1)
        return model.layer(x).cos() if model.count >= 1 else model.layer(x)

    model = Asking(ask)
    arguments = {"x": torch.ones(6, 4), "ids": IDS}
    captured = capture_step(model, arguments, loss=lambda y: y.sum(), measure_scratch=False)
    assert any("cos" in op.target for op in captured.graph.operators)
    assert model.count.item() == 0


def test_a_draw_is_the_one_that_eager_makes() -> None:
    """Random numbers that decide come in the step's own sequence, after those before them."""

    def ask(model: Asking, x: Tensor, ids: Tensor) -> Tensor:
        h = nn.functional.dropout(model.layer(x), 0.5)
        return h.cos() if torch.rand(()) < 0.5 else h.sin()

    for seed in range(6):
        torch.manual_seed(seed)
        captured = capture(ask)
        torch.manual_seed(seed)
        nn.functional.dropout(torch.ones(6, 4), 0.5)
        expected = "cos" if torch.rand(()) < 0.5 else "sin"
        assert any(expected in op.target for op in captured.graph.operators if not op.pinned)


def test_asking_leaves_the_generator_alone() -> None:
    """A question that draws numbers to be answered leaves the generator where it was."""
    model = Asking(lambda m, x, ids: m.layer(x) if torch.rand(()) < 2 else m.layer(x).cos())
    arguments = {"x": torch.ones(6, 4), "ids": IDS}
    before = torch.get_rng_state()
    capture_step(model, arguments, loss=lambda y: y.sum(), measure_scratch=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_way_can_be_gone_without_values() -> None:
    """With the outcomes of an earlier capture a sample on meta gives the same graph."""

    def ask(model: Asking, x: Tensor, ids: Tensor) -> Tensor:
        if ids.max() >= 10:
            raise ValueError("out of range")
        return model.layer(x)[ids != 0]

    first = capture(ask)
    again = capture(ask, IDS.to("meta"), taken=first.step.taken)
    assert again.graph.fingerprint == first.graph.fingerprint


def test_another_number_of_questions_is_a_mismatch() -> None:
    """Outcomes that nobody asks for, or too few of them, belong to another model."""
    one = (Outcome(number=False),)
    with pytest.raises(OutcomeMismatchError, match="0 times"):
        capture(lambda m, x, ids: m.layer(x), taken=TakenPath(branch_free=False, outcomes=one))
    with pytest.raises(OutcomeMismatchError, match="was not asked for"):
        capture(
            lambda m, x, ids: m.layer(x) if ids.max() > ids.min() and ids.any() else x,
            taken=TakenPath(branch_free=False, outcomes=(Outcome(number=True),)),
        )


def test_outcomes_survive_json() -> None:
    """Numbers, not-a-number among them, and kinds of tensors come back as they were."""
    captured = capture(lambda m, x, ids: m.layer(x)[ids != 0])
    for outcome in (
        Outcome(number=True),
        Outcome(number=3),
        Outcome(number=float("-inf")),
        Outcome(number=1 + 2j),
        Outcome(values=(1, 2)),
        *captured.step.outcomes,
    ):
        assert Outcome.from_json(outcome.to_json()) == outcome
    assert Outcome.from_json(Outcome(number=float("nan")).to_json()).number != 0


def test_a_check_raises_for_another_value_only() -> None:
    """Not-a-number is the value that it was planned for when it was planned for."""
    expect_number(torch.tensor(float("nan")), float("nan"), 0)
    expect_shape(torch.ones(2, 3), [2, 3], 0)
    expect_values(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), 0)
    with pytest.raises(OutcomeChanged):
        expect_number(torch.tensor(2), 3, 0)
    with pytest.raises(OutcomeChanged):
        expect_shape(torch.ones(2, 3), [2, 4], 0)
    with pytest.raises(OutcomeChanged):
        expect_values(torch.tensor([1, 2]), torch.tensor([1, 3]), 0)


def test_what_is_written_before_the_last_check_is_known() -> None:
    """Running statistics that are updated before a check are put back when it fails."""

    def ask(model: Asking, x: Tensor, ids: Tensor) -> Tensor:
        h = nn.functional.dropout(model.norm(model.layer(x)), 0.5)
        return h if ids.any() else h.cos()

    before = before_checks(capture(ask).step.graph)
    names = {node.meta["target"] for node in before.written}
    assert names == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert before.num_bytes == 4 * 4 + 4 * 4 + 8


def test_lengths_of_a_ctc_loss_are_the_samples() -> None:
    """A connectionist loss has sizes that the lengths of the targets decide."""

    def ask(model: Asking, x: Tensor, ids: Tensor) -> Tensor:
        scores = model.layer(x)[:, None].log_softmax(-1)
        lengths = (ids[:4] > 0).sum(0, keepdim=True)
        targets = torch.tensor([[1, 2, 1]])
        return nn.functional.ctc_loss(scores, targets, torch.tensor([6]), lengths)

    assert [target for target, _ in checks_of(capture(ask))] == [expect_shape]


def test_lengths_of_a_ctc_loss_in_lists_are_refused_in_words() -> None:
    """PyTorch writes them to memory that stand-ins do not have; as tensors they do the same."""
    targets = torch.tensor([[1, 2, 1]])

    def loss(scores: Tensor, *lengths: Any) -> Tensor:
        return nn.functional.ctc_loss(scores[:, None].log_softmax(-1), targets, *lengths)

    with pytest.raises(CaptureError, match=r"give input_lengths and target_lengths as tensors"):
        capture(lambda model, x, ids: loss(model.layer(x), [6], [3]))
    scores = torch.randn(6, 4)
    assert torch.equal(loss(scores, [6], [3]), loss(scores, *torch.tensor([[6], [3]])))


def test_a_list_of_tensors_becomes_a_tensor() -> None:
    """``torch.tensor`` of numbers that forward computed stacks them, in the dtype of all."""

    def ask(model: Asking, x: Tensor, ids: Tensor) -> Tensor:
        rows = torch.tensor([[ids.max() - 4, 2], [ids.min(), ids[1]]])
        assert rows.dtype == torch.long
        assert torch.tensor([ids[0], x[0, 0].double()]).dtype == torch.double
        return model.layer(x)[rows.flatten()]

    captured = capture(ask)
    assert any("stack" in op.target for op in captured.graph.operators)
    assert checks_of(captured) == []


def test_a_mask_that_backward_picks_by_is_checked_in_forward() -> None:
    """The gradient of what is written by a mask has the mask's size, which forward checks."""

    def ask(model: Asking, x: Tensor, ids: Tensor) -> Tensor:
        h = model.layer(x)
        out = h.clone()
        out[ids != 0] = h[:3] * 2
        return out

    captured = capture(ask)
    checks = [n for n in captured.step.graph.nodes if "expect_shape" in str(n.target)]
    assert [n.meta["phase"] for n in checks] == ["forward"]
    assert [n.args[1] for n in checks] == [[3, 1]]


def test_a_kernel_is_asked_where_its_stand_in_refuses() -> None:
    """Grouped products of float32 run on the CPU, which their stand-in denies."""
    ends = torch.tensor([2, 6], dtype=torch.int32)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.weight, offs=ends)

    sample = {"x": torch.randn(6, 4)}
    captured = capture_step(
        Experts(), sample, loss=lambda y: y.square().sum(), measure_scratch=False
    )
    assert any("_grouped_mm" in op.target for op in captured.graph.operators)


def test_the_truth_of_a_number_is_no_more_than_that() -> None:
    """``if tensor:`` of a number is planned for its being other than zero."""
    captured = capture(lambda m, x, ids: m.layer(x) if ids.sum() else m.layer(x).cos())
    assert checks_of(captured) == [(expect_number, True)]
    captured = capture(lambda m, x, ids: m.layer(x).cos() if m.layer(x).sum() else m.layer(x))
    assert checks_of(captured) == [(expect_number, True)]


def test_closeness_of_two_tensors_is_a_question() -> None:
    """``torch.allclose`` is answered and checked."""
    captured = capture(lambda m, x, ids: m.layer(x) if torch.allclose(x, x) else m.layer(x).cos())
    assert checks_of(captured) == [(expect_number, True)]
