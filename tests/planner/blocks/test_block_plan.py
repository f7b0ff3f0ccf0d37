"""Plans inside blocks: same bits, below the budget, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import (
    BlockPlan,
    InfeasibleBudgetError,
    PlanError,
    PlanMismatchError,
    applied_blocks,
    measure,
    optimize,
    unplanned,
    watch,
)
from planner.base.budget import RequestedBudget
from planner.base.request import Request
from planner.base.solve_options import SolveOptions
from planner.base.step_spec import StepSpec
from planner.blocks.make_blocks import captured_in_blocks
from planner.errors import CallMismatchError

from .small_blocks import Layer, Small, batch, small, small_plan


def _steps(model: nn.Module, count: int = 3) -> list[Any]:
    """Losses, gradients and generator states of some steps with an optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found: list[Any] = []
    for step in range(count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = model(*batch())
        loss.backward()
        found += [loss.detach(), torch.get_rng_state()]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return found


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_bits_are_eagers_over_several_steps_with_dropout() -> None:
    """Loss, gradients and the generator's state of three steps."""
    planned = small_plan().apply(small())
    assert _same(_steps(planned), _steps(small()))
    applied = applied_blocks(planned)
    assert applied is not None
    assert (applied.planned_steps, applied.unplanned_steps) == (3, 0)


def test_something_is_repeated() -> None:
    """At 70 % of the memory the plan costs time, and its blocks' plans say where."""
    plan = small_plan()
    assert plan.overhead > 0
    assert any(part.schedule.recomputed() for part in plan.parts.plans)


def test_the_measured_peak_is_the_predicted_one() -> None:
    """To the byte, by the allocator's record, and so below the budget."""
    plan = small_plan()
    measured = measure(plan.apply(small()), batch(), repeats=0)
    assert measured.peak_bytes == plan.predicted_peak_bytes <= plan.budget_bytes


def test_the_baseline_is_that_of_the_whole_step() -> None:
    """Put together from its blocks, the step without a plan has the same peak and time."""
    whole = optimize(small(), batch(), budget="100%", time_limit_s=0.1)
    plan = small_plan()
    assert plan.baseline_peak_bytes == whole.baseline_peak_bytes
    assert plan.baseline_step_us == whole.baseline_step_us


def test_blocks_without_biases_are_alike() -> None:
    """What a twin has registered is looked for where the captured block has it."""
    model = small()
    for layer in model.layers:
        layer.up.bias = layer.down.bias = None
    spec = StepSpec(model=model, sample_input=batch())
    request = Request.of(spec, SolveOptions(), budget=RequestedBudget(num_bytes=None, share=1.0))
    with captured_in_blocks(spec, request, "layers.*") as call:
        assert len(call.captured.eager.blocks) == 1
    model.layers[1].up.bias = torch.nn.Parameter(torch.zeros(64))
    with captured_in_blocks(spec, request, "layers.*") as call:
        assert len(call.captured.eager.blocks) == 2


def test_alike_blocks_are_captured_once() -> None:
    """An attribute that differs and is not read makes no difference."""
    assert len({plan.fingerprint for plan in small_plan().parts.plans}) == 1
    assert small_plan().blocks == ("layers.0", "layers.1", "layers.2")


def test_the_whole_steps_plan_is_said() -> None:
    """It takes no more time than the plan in blocks, and its bound no more than either."""
    plan = small_plan()
    whole = plan.parts.whole
    assert whole is not None
    assert whole.lower_bound_us <= plan.predicted_step_us * (1 + 1e-9)
    assert "the same budget for the whole step" in str(plan)
    assert "schedules in eager's order that repeat a block's operators inside" in str(plan)


def test_the_model_is_left_as_it_was() -> None:
    """Planning in blocks puts nothing into the model's modules."""
    model = small()
    before = {path: dict(vars(m)) for path, m in model.named_modules()}
    optimize(model, batch(), budget="100%", granularity="blocks", time_limit_s=0.2)
    assert all(vars(m).keys() == before[path].keys() for path, m in model.named_modules())


def test_removed_blocks_run_their_own_forward() -> None:
    """Removing takes all plans out at once, and once only."""
    planned = small_plan().apply(small())
    BlockPlan.remove(planned)
    assert applied_blocks(planned) is None
    with pytest.raises(PlanError, match="no block of this Small has a plan"):
        BlockPlan.remove(planned)


def test_hooks_on_blocks_run() -> None:
    """A block stays a module: its forward hook sees the output."""
    planned = small_plan().apply(small())
    seen: list[torch.Size] = []
    planned.get_submodule("layers.1").register_forward_hook(
        lambda _module, _args, out: seen.append(out.shape)
    )
    planned(*batch()).backward()
    assert seen == [torch.Size([64, 16])]


@pytest.mark.slow
def test_a_budget_below_the_least_names_the_least() -> None:
    """And a plan for that budget exists."""
    arguments: dict[str, Any] = {"granularity": "blocks", "time_limit_s": 0.3}
    with pytest.raises(InfeasibleBudgetError, match="inside the 3 blocks fit") as caught:
        optimize(small(), batch(), budget_bytes=30_000, **arguments)
    least = caught.value.min_budget_bytes
    plan = optimize(small(), batch(), budget_bytes=least, **arguments)
    assert plan.predicted_peak_bytes <= least


def test_another_shape_is_named_with_the_difference() -> None:
    """Each block refuses a call that it was not planned for."""
    planned = small_plan().apply(small())
    with pytest.raises(CallMismatchError, match="planned was"):
        planned(*batch(rows=32))


def test_another_shape_may_run_unplanned() -> None:
    """With a warning, by the blocks' own forward, with eager's bits."""
    planned = small_plan().apply(small(), on_shape_change="unplanned")
    x, target = batch(rows=32)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="not run by its plan"):
        found = planned(x, target)
    torch.manual_seed(0)
    assert torch.equal(found, small()(x, target))


def test_a_block_cannot_plan_another_shape_by_itself() -> None:
    """The budget is the whole step's."""
    with pytest.raises(ValueError, match="the budget is the whole step's"):
        small_plan().apply(small(), on_shape_change="adapt")


def test_another_model_is_refused_whole() -> None:
    """The third block is missing, and the first two stay without plans."""
    model = small(num_layers=2)
    with pytest.raises(PlanMismatchError, match=r"no block 'layers\.2'"):
        small_plan().apply(model)
    assert applied_blocks(model) is None


def test_another_block_is_named() -> None:
    """It has another activation; the blocks before it are taken back."""
    model = small()
    model.layers[1].forward = lambda x, *, scale=1.0: x * scale + model.layers[1].down.bias
    with pytest.raises(PlanMismatchError, match=r"block 'layers\.1'"):
        small_plan().apply(model)
    assert applied_blocks(model) is None


def test_a_copy_of_a_planned_model_is_planned() -> None:
    """Each block's copy is bound to its own parameters."""
    planned = small_plan().apply(small())
    assert _same(_steps(copy.deepcopy(planned), 1), _steps(small(), 1))
    stored = pickle.loads(pickle.dumps(planned))
    assert _same(_steps(stored, 1), _steps(small(), 1))
    assert applied_blocks(stored).planned_steps == 1
    assert len(pickle.dumps(planned.layers[0])) < len(pickle.dumps(planned)) / 2


def test_hooks_on_parameters_of_blocks_draw_as_without_a_plan() -> None:
    """Noise that is added to each gradient as it arrives, block by block."""
    found = []
    for model in (small(), small_plan().apply(small())):
        for p in model.parameters():
            p.register_hook(lambda g: g + torch.randn_like(g))
        found.append(_steps(model))
    assert _same(*found)


class Shared(Small):
    """The first block's output is read by the head, too."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        first = self.layers[0](self.embed(x))
        hidden = self.layers[2](self.layers[1](first)) + first
        return nn.functional.cross_entropy(self.head(hidden), target)


def test_a_sum_in_another_order_is_refused() -> None:
    """What a block adds itself would come after the head's contribution in eager, one by one."""
    model = Shared().train()
    with pytest.raises(PlanError, match="uses 'x' more than once, and others use it later"):
        optimize(model, batch(), budget="90%", granularity="blocks", blocks="layers.*")


def test_auto_leaves_out_what_is_not_fit() -> None:
    """The other two blocks are planned."""
    plan = optimize(Shared().train(), batch(), budget="95%", granularity="blocks", time_limit_s=0.3)
    assert isinstance(plan, BlockPlan)
    assert plan.blocks == ("layers.0", "layers.2")


class Twice(Small):
    """One block is called twice."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden = self.layers[0](self.layers[0](self.embed(x)))
        return nn.functional.cross_entropy(self.head(hidden), target)


def test_a_block_that_is_called_twice_is_refused() -> None:
    """What both calls save would lie in memory at once."""
    with pytest.raises(PlanError, match=r"'layers\.0' is called 2 times in one step"):
        optimize(Twice().train(), batch(), budget="90%", granularity="blocks", blocks="layers.0")


@pytest.mark.parametrize(
    "option",
    [{"shapes": "sample"}, {"reorder": True}, {"never_recompute": ("aten.mm*",)}],
    ids=["shapes", "reorder", "rules"],
)
def test_options_of_whole_steps_are_refused(option: dict[str, Any]) -> None:
    """The message names the option."""
    with pytest.raises(ValueError, match=f"{next(iter(option))}.* is for a plan of the whole step"):
        optimize(small(), batch(), budget="90%", granularity="blocks", **option)


def test_a_watched_call_is_planned_as_a_whole() -> None:
    """Whoever wants blocks passes the sample on."""
    with pytest.raises(ValueError, match="planned as a whole step"):
        watch(small(), budget="90%", granularity="blocks")


class Opaque(Small):
    """What lies between the blocks asks for a value that only backward's end knows."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = layer(hidden, scale=0.5)
        weights = torch.tensor(hidden.detach().numpy().mean(), dtype=hidden.dtype)
        return nn.functional.cross_entropy(self.head(hidden) * weights, target)


def test_a_plan_of_other_blocks_takes_the_place_of_an_earlier_one() -> None:
    """No block keeps its earlier plan, whose memory the new one does not count."""
    planned = small_plan().apply(small())
    fewer = optimize(small(), batch(), budget="95%", granularity="blocks", blocks="layers.0")
    applied = applied_blocks(fewer.apply(planned))
    assert applied is not None
    assert list(applied.blocks) == ["layers.0"]


def test_a_plan_that_does_not_fit_leaves_no_part_of_an_earlier_one() -> None:
    """The first block fits, the last one does not."""
    planned = small_plan().apply(small())
    planned.layers[-1].append_parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(PlanMismatchError, match="append_parameter"):
        small_plan().apply(planned)
    assert applied_blocks(planned) is None


def test_a_refusal_of_the_whole_step_offers_blocks() -> None:
    """By the argument that plans them."""
    with pytest.raises(RuntimeError) as caught:
        optimize(Opaque().train(), batch(), budget="90%")
    assert any("granularity='blocks'" in note for note in caught.value.__notes__)


def test_no_plan_inside_runs_where_none_is_wanted() -> None:
    """``planner.unplanned`` reaches the blocks."""
    planned = small_plan().apply(small())
    with unplanned(planned):
        planned(*batch()).backward()
    applied = applied_blocks(planned)
    assert applied is not None
    assert applied.planned_steps == 0


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_plan_of_the_step_is_not_made_beside_plans_inside() -> None:
    """The error says what has a plan, and how to remove it."""
    with pytest.raises(PlanError, match=r"module 'layers.0' inside this Small has a plan of its"):
        optimize(small_plan().apply(small()), batch(), budget="90%")


class _WrittenTo(nn.Module):
    """Writes in place to what its blocks return."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).mul_(2)
        return x.square().mean()


def test_a_block_whose_output_is_written_to_is_refused() -> None:
    """By name; a plan inside would not see the write."""
    with pytest.raises(PlanError, match=r"writes in place to what block 'blocks\.\d' returns"):
        optimize(
            _WrittenTo(), torch.ones(99, 16), budget="85%", granularity="blocks", blocks="blocks.*"
        )


def test_a_raw_input_leaves_nothing_behind() -> None:
    """The first block's input needs no gradient, the others' do: peak as without a plan.

    The gradient of a sum has no memory of its own, and the last block's plan copies it.
    """
    model = nn.Sequential(*(Layer(16, i) for i in range(3))).train()
    x = torch.randn(64, 16)
    words: dict[str, Any] = {"loss_fn": torch.sum, "granularity": "blocks", "blocks": "*"}
    unplanned = optimize(model, x, budget_gb=1, loss_fn=torch.sum).baseline_peak_bytes
    plan = optimize(model, x, budget_bytes=unplanned + x.nbytes + 64, time_limit_s=1, **words)
    found = plan.validate(model, x, repeats=0)
    assert found.bits == "equal"
    assert plan.overhead == 0
    assert 0 <= found.peak.predicted - found.peak.measured <= 64
