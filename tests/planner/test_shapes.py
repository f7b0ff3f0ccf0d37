"""``shapes=``: one plan for every shape up to the largest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from benchmarks.testing.bitwise import assert_same_tensors
from planner import (
    CallMismatchError,
    Plan,
    PlanError,
    PlanMismatchError,
    PlanWarning,
    applied_plan,
    optimize,
)
from planner.errors import OutcomeChangedError
from tests.planner.small import Net, make, plan_for, sample, square


class Pair(nn.Module):
    """Token embeddings and a mask, with a length that varies in both."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, ids: Tensor, extra: dict[str, Tensor]) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return (x * extra["mask"][..., None]).square().mean()


def batch(rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (rows, length), generator=generator)
    return {"ids": ids, "extra": {"mask": torch.ones(rows, length)}}


RANGE = {"ids": {0: 8, 1: Dim("length", max=64)}, "extra.mask": {0: 8, 1: 64}}


@pytest.fixture(scope="module")
def pair_plan() -> Plan:
    """Made with a small sample, for 8 rows of 64."""
    return plan_for(make(Pair), batch(2, 5), shapes=RANGE)


def trained(model: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(**call)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def test_the_plan_is_for_the_largest_and_holds_for_all(pair_plan: Plan) -> None:
    """A small sample is enlarged; every call in the range has eager's bits and fits."""
    assert pair_plan.guard.arguments["ids"].shape == (8, 64)
    assert "up to the planned ones: ids (dimension 0 to 8, dimension 1 to 64)" in str(pair_plan)
    plain, planned = make(Pair), pair_plan.apply(make(Pair))
    for rows, length in ((8, 64), (8, 63), (3, 64), (1, 1), (8, 63)):
        call = batch(rows, length, seed=rows)
        assert_same_tensors(trained(plain, call), trained(planned, call))
    found = applied_plan(planned)
    assert found is not None
    assert (found.planned_steps, found.captures) == (5, 3)
    assert found.peak_bytes <= pair_plan.budget_bytes


@pytest.mark.parametrize(
    "call", [batch(9, 64), batch(8, 65), {"ids": batch(8, 3)["ids"], "extra": {}}]
)
def test_beyond_the_range_the_policy_holds(pair_plan: Plan, call: dict[str, Any]) -> None:
    """A larger call, or another kind of call, is refused as without a range."""
    with pytest.raises(CallMismatchError):
        pair_plan.apply(make(Pair))(**call)


def test_the_sample_is_the_largest() -> None:
    """``"sample"`` lets every dimension be smaller."""
    plan = plan_for(make(), sample(), shapes="sample", loss_fn=square)
    plain, planned = make(), plan.apply(make())
    for rows in (256, 100, 1 + 1):
        results = []
        for model in (plain, planned):
            torch.manual_seed(rows)
            model.zero_grad()
            square(model(sample(rows=rows))).backward()
            results.append({n: p.grad for n, p in model.named_parameters()})
        assert_same_tensors(*results)


def test_a_file_keeps_the_range(pair_plan: Plan, tmp_path: Path) -> None:
    """A loaded plan covers the same calls."""
    pair_plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.shapes == pair_plan.shapes
    call = batch(4, 7)
    assert_same_tensors(trained(make(Pair), call), trained(loaded.apply(make(Pair)), call))


def test_a_file_needs_the_loss_for_another_shape(tmp_path: Path) -> None:
    """The loss is not in the file; apply() takes it."""
    plan = plan_for(make(), sample(), shapes="sample", loss_fn=square)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"apply\(model, loss_fn="):
        loaded.apply(make())(sample(rows=9))
    loaded.apply(make(), loss_fn=square)(sample(rows=9))


@pytest.mark.parametrize(
    "shapes",
    [
        {"ids": {"2": 4}},
        {"ids": {"1": 65}},
        {"nothing": {"0": 1}},
        {"ids": {"1": -3}},
        {"ids": {"x": 64}},
        {"ids": 3},
        [],
    ],
)
def test_a_damaged_range_is_refused(pair_plan: Plan, tmp_path: Path, shapes: Any) -> None:
    """What no planner wrote is not believed."""
    path = tmp_path / "plan.json"
    pair_plan.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "shapes": shapes}))
    with pytest.raises(PlanError, match="shapes"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"y": {0: 3}}, "tensors are 'x'"),
        ({"x": {2: 3}}, "dimension 2"),
        ({"x": {-1: 300}}, "dimension -1"),
        ({"x": {0: 3}}, "at least the sample's 256"),
        ({"x": {0: Dim("rows")}}, "largest size"),
        ({"x": {0: True}}, "largest size"),
        ({"x": 300}, "mapping from dimensions"),
        ("largest", '"sample" or a mapping'),
    ],
)
def test_a_range_that_does_not_fit_is_refused(shapes: Any, message: str) -> None:
    """The error names the place and what the sample has there."""
    with pytest.raises(ValueError, match=message):
        optimize(make(Net), sample(), budget_gb=1, shapes=shapes)


def test_a_size_that_no_memory_holds_is_refused_with_the_limit() -> None:
    """Before a tensor of it is made."""
    with pytest.raises(ValueError, match=r"of 128000000000000 bytes .* limit is 17\.2 GB"):
        optimize(make(Net), sample(), budget_gb=1, shapes={"x": {0: 10**12}})


def test_a_row_that_a_slice_left_its_stride_is_in_the_range(pair_plan: Plan) -> None:
    """Neither ``clone()`` nor ``contiguous()`` would change the stride of a single row."""
    plain, planned = make(Pair), pair_plan.apply(make(Pair))
    whole = batch(8, 64)
    call = {"ids": whole["ids"][:1, :30], "extra": {"mask": torch.ones(1, 30)}}
    assert call["ids"].is_contiguous()
    assert call["ids"].stride() == (64, 1)
    assert_same_tensors(trained(plain, call), trained(planned, call))


@pytest.mark.parametrize("policy", ["error", "unplanned"])
@pytest.mark.parametrize("rows", [256, 100])
def test_another_autocast_is_no_other_shape(policy: Any, rows: int) -> None:
    """The policy decides about a call under another autocast, whatever its sizes."""
    model = plan_for(make(), sample(), loss_fn=square, shapes="sample").apply(
        make(), on_shape_change=policy
    )
    with torch.autocast("cpu", torch.bfloat16):
        if policy == "error":
            with pytest.raises(CallMismatchError, match="planned was"):
                model(sample(rows=rows))
        else:
            with pytest.warns(PlanWarning, match="not run by its plan"):
                model(sample(rows=rows))
    applied = applied_plan(model)
    assert applied is not None
    assert applied.planned_steps == applied.captures == 0


def test_a_weight_that_is_frozen_is_no_other_shape() -> None:
    """The policy decides about a model that has changed."""
    model = plan_for(make(), sample(), loss_fn=square, shapes="sample").apply(make())
    assert isinstance(model, Net)
    model.head.weight.requires_grad_(False)
    with pytest.raises((CallMismatchError, PlanMismatchError), match=r"head\.weight"):
        model(sample())


def test_a_longer_sample_lies_in_memory_as_the_sample_does() -> None:
    """Images with their channels last are planned, and trained, with their channels last."""

    def convolutions() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def image(rows: int) -> Tensor:
        return torch.ones(rows, 4, 8, 8).to(memory_format=torch.channels_last)

    model = make(convolutions)
    plan = optimize(model, image(2), budget="100%", shapes={"input": {0: 4}})
    assert plan.guard.arguments["input"].stride == image(4).stride()
    planned = plan.apply(model)
    for rows in (4, 2, 1):
        planned(image(rows)).sum().backward()


def test_a_tensor_without_elements_has_no_range(tmp_path: Path) -> None:
    """Its dimension of size 0 cannot be smaller; the plan can be saved."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            return self.layer(torch.cat([x, more])).sum()

    call = sample(rows=4, width=16), torch.empty(0, 16)
    plan = optimize(make(Joined), call, budget="100%", shapes="sample")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").shapes == plan.shapes
    assert plan.shapes.largest["more"] == {1: 16}


class Guarded(Pair):
    """Leaves the mask out of the computation where it masks nothing."""

    def forward(self, ids: Tensor, extra: dict[str, Tensor]) -> Tensor:
        if extra["mask"].all():
            extra = {"mask": torch.ones(())[None, None]}
        return super().forward(ids, extra)


@pytest.mark.parametrize(("rows", "policy"), [(8, "error"), (3, "error"), (8, "adapt")])
def test_another_way_is_no_shape(rows: int, policy: Any) -> None:
    """A value that decides otherwise is left to ``on_shape_change``, whatever the shape."""
    plan = optimize(make(Guarded), batch(8, 16), budget_gb=1, shapes="sample")
    plain, planned = make(Guarded), plan.apply(make(Guarded), on_shape_change=policy)
    call = batch(rows, 16)
    assert_same_tensors(trained(plain, call), trained(planned, call))
    call["extra"]["mask"][0, 3] = 0
    if policy == "error":
        with pytest.raises(OutcomeChangedError, match=r"was True .* is False now.*='adapt'"):
            planned(**call)
    else:
        assert_same_tensors(trained(plain, call), trained(planned, call))


@pytest.mark.parametrize(
    "cut",
    [lambda x: x[:100], lambda x: x[:, :20], lambda x: x[50:90, 4:24], lambda x: x[::2]],
    ids=["rows", "columns", "a window", "every second row"],
)
def test_what_is_cut_out_of_a_larger_tensor_is_in_the_range(cut: Any) -> None:
    """Its strides are those of the whole; the sample may be cut out or not."""

    def kind() -> nn.Module:
        return nn.Sequential(nn.Tanh(), nn.Softmax(0))

    whole = sample(rows=256)
    for largest in (whole, sample(rows=300, width=40)[:256, :32]):
        model = optimize(
            kind(), largest.requires_grad_(), budget="100%", loss_fn=square, shapes="sample"
        ).apply(kind())
        results = []
        for one in (kind(), model):
            call = cut(whole.detach()).requires_grad_()
            square(one(call)).backward()
            results.append({"x": call.grad})
        assert_same_tensors(*results)


def test_another_order_in_memory_is_no_other_size(pair_plan: Plan) -> None:
    """A transposed batch is another call, and the error says how it lies."""
    turned = batch(5, 30)
    turned["ids"] = turned["ids"].t().contiguous().t()
    with pytest.raises(CallMismatchError, match=r"\[5, 30\] with strides \[1, 5\] on cpu, planned"):
        pair_plan.apply(make(Pair))(**turned)


def test_a_policy_that_is_nearly_one_is_named(pair_plan: Plan) -> None:
    """A letter in the wrong place is no riddle."""
    with pytest.raises(ValueError, match="got 'adpat'; did you mean 'adapt'"):
        pair_plan.apply(make(Pair), on_shape_change="adpat")  # type: ignore[arg-type]
