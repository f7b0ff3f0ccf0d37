"""Plans inside blocks: the program against enumeration, points against their limits."""

from __future__ import annotations

from itertools import product

import pytest

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.block_plans.least import least_memory_of_blocks
from solvers.block_plans.points import BlockPoints
from solvers.block_plans.program import Choice, Program
from solvers.block_plans.solve import solve_blocks
from solvers.block_plans.stepping import Block, BlockCall, BlockedStep
from solvers.replay import replay
from solvers.schedule import Schedule

# A block's storages: input, two activations, output, tangent, gradient.
X, A, B, Y, DY, DX = range(6)


def _block(scale: int = 1) -> Block:
    """Two operators forward, two backward; both activations are read by backward."""
    sizes = {"x": 4, "a": 6 * scale, "b": 10 * scale, "y": 4, "dy": 4, "dx": 4}
    producers = {"x": None, "a": 0, "b": 1, "y": 2, "dy": 3, "dx": 5}
    storages = [
        Storage(name=name, size_bytes=sizes[name], producer=producers[name], kept=name == "dx")
        for name in sizes
    ]
    storages.append(Storage(name="t", size_bytes=2, producer=4))
    operators = (
        Operator(name="f1", inputs=(X,), outputs=(A,), cost_ns=5),
        Operator(name="f2", inputs=(A,), outputs=(B,), cost_ns=3),
        Operator(name="f3", inputs=(B,), outputs=(Y,), cost_ns=7),
        Operator(name="turn", inputs=(Y,), outputs=(DY,), phase="loss", pinned="loop"),
        Operator(name="b1", inputs=(B, DY), outputs=(6,), cost_ns=9, phase="backward"),
        Operator(name="b2", inputs=(A, 6), outputs=(DX,), cost_ns=9, phase="backward"),
    )
    return Block(graph=CostGraph(operators, tuple(storages)), turn=3)


def _step(num_blocks: int, scales: tuple[int, ...] = (1,)) -> BlockedStep:
    """A chain of blocks: x0 -> block -> x1 -> … -> loss -> … -> gradient of x0."""
    names: list[Storage] = [Storage(name="x0", size_bytes=4, producer=None, category="input")]
    operators: list[Operator] = []
    calls = []
    for i in range(num_blocks):
        names.append(Storage(name=f"x{i + 1}", size_bytes=4, producer=len(operators)))
        operators.append(Operator(name=f"forward{i}", inputs=(i,), outputs=(i + 1,)))
    tangent = len(names)
    names.append(Storage(name="tangent", size_bytes=4, producer=len(operators)))
    operators.append(
        Operator(
            name="loss",
            inputs=(num_blocks,),
            outputs=(tangent,),
            cost_ns=11,
            workspace_bytes=8,
            phase="loss",
            pinned="loop",
        )
    )
    for i in reversed(range(num_blocks)):
        made = len(names)
        names.append(Storage(name=f"dx{i}", size_bytes=4, producer=len(operators)))
        block = i % len(scales)
        calls.append(
            BlockCall(
                path=f"layers.{i}",
                block=block,
                forward=i,
                backward=len(operators),
                outside={X: i, Y: i + 1, DY: tangent, DX: made},
                arguments=(i,),
            )
        )
        operators.append(
            Operator(name=f"backward{i}", inputs=(i, tangent), outputs=(made,), phase="backward")
        )
        tangent = made
    rest = CostGraph(tuple(operators), tuple(names))
    return BlockedStep(rest, tuple(map(_block, scales)), tuple(reversed(calls)))


def _points(step: BlockedStep) -> list[BlockPoints]:
    return [
        BlockPoints(
            block,
            inputs=frozenset({X}),
            outputs=frozenset({Y}),
            tangents=frozenset({DY}),
            leaving=step.leaving(b),
        )
        for b, block in enumerate(step.blocks)
    ]


SCHEDULES = (
    Schedule((0, 1, 2, 3, 4, 5)),
    Schedule((0, 1, 2, 3, 1, 4, 5)),
    Schedule((0, 1, 2, 3, 0, 1, 4, 5)),
    Schedule((0, 1, 2, 3, 4, 0, 5)),
    Schedule((0, 1, 2, 3, 0, 1, 4, 0, 5)),
)


def test_the_whole_step_has_every_operator_of_every_block() -> None:
    """Two blocks of five operators beside the turn, and the loss."""
    whole = _step(2).whole
    assert [op.name for op in whole.operators][:3] == [
        "layers.0/f1",
        "layers.0/f2",
        "layers.0/f3",
    ]
    assert whole.num_operators == 2 * 5 + 1
    assert whole.base_cost_ns == 2 * 33 + 11


def test_a_saved_activation_lives_from_forward_to_backward() -> None:
    """At the loss of two blocks that keep all: x0, x1, x2, both a and b, tangent, scratch."""
    step = _step(2)
    memory = replay(step.whole, Schedule.keep_all(step.whole)).memory_bytes
    assert memory[6] == 3 * 4 + 2 * (6 + 10) + 4 + 8


def test_a_block_schedule_runs_in_its_own_block_only() -> None:
    """The second block runs its second operator again, before its own backward."""
    step = _step(2)
    chosen = {"layers.0": SCHEDULES[0], "layers.1": SCHEDULES[1]}
    names = [step.whole.operators[v].name for v in step.schedule(chosen).order]
    assert names[7:9] == ["layers.1/f2", "layers.1/b1"]
    assert len(names) == 12


@pytest.mark.parametrize("scales", [(1,), (1, 3)])
def test_the_program_finds_what_enumeration_finds(scales: tuple[int, ...]) -> None:
    """At every budget the cheapest of all choices that fit, by replay of each."""
    step = _step(3, scales)
    points = _points(step)
    choices = [[Choice.of(ps.measured(s)) for s in SCHEDULES] for ps in points]
    program = Program(step)
    costs = []
    for picked in product(SCHEDULES, repeat=3):
        outcome = replay(step.whole, step.schedule(dict(zip(step.paths, picked, strict=True))))
        costs.append((outcome.peak_bytes, outcome.cost_ns))
    for budget in sorted({peak for peak, _ in costs}):
        best = min(cost for peak, cost in costs if peak <= budget)
        found = program.solve(choices, budget, time_limit_s=5.0, gap=0.0)
        assert found.chosen is not None
        chosen = {p: SCHEDULES[i] for p, i in zip(step.paths, found.chosen, strict=True)}
        outcome = replay(step.whole, step.schedule(chosen))
        assert (outcome.peak_bytes <= budget, outcome.cost_ns) == (True, best)


@pytest.mark.parametrize("scales", [(1,), (1, 3)])
def test_no_choice_takes_less_than_the_bound(scales: tuple[int, ...]) -> None:
    """The bound of each budget against the cheapest of all choices of those schedules."""
    step = _step(3, scales)
    costs = []
    for picked in product(SCHEDULES, repeat=3):
        outcome = replay(step.whole, step.schedule(dict(zip(step.paths, picked, strict=True))))
        costs.append((outcome.peak_bytes, outcome.cost_ns))
    budgets = sorted({peak for peak, _ in costs})
    for budget in budgets[len(budgets) // 2 :: 2][:2]:
        result = solve_blocks(step, _points(step), budget, time_limit_s=1.0)
        best = min(cost for peak, cost in costs if peak <= budget)
        assert result.lower_bound_ns <= best
        assert result.chosen is not None
        assert result.cost_ns <= best
        assert result.peak_bytes <= budget


@pytest.mark.parametrize("scales", [(1,), (1, 3)])
def test_the_bound_meets_the_choice(scales: tuple[int, ...]) -> None:
    """Twelve blocks at budgets that only what they save decides: proven to 0.1 % of the step."""
    step = _step(12, scales)
    keep_all = replay(step.whole, Schedule.keep_all(step.whole)).peak_bytes
    for part in (0.9, 0.8, 0.7):
        result = solve_blocks(step, _points(step), int(part * keep_all), time_limit_s=10.0)
        assert result.chosen is not None
        assert 0 < result.lower_bound_ns <= result.cost_ns <= 1.001 * result.lower_bound_ns


def test_the_relaxed_program_is_no_dearer_than_the_choice() -> None:
    """Parts of choices cost no more than whole ones, and say which choices they are parts of."""
    step = _step(3)
    (ps,) = _points(step)
    choices = [[Choice.of(ps.measured(s)) for s in SCHEDULES]]
    program = Program(step)
    peak_bytes = replay(step.whole, Schedule.keep_all(step.whole)).peak_bytes
    dearer = 0
    for budget in range(peak_bytes - 20, peak_bytes):
        whole = program.solve(choices, budget, time_limit_s=5.0, gap=0.0)
        parts = program.solve(choices, budget, time_limit_s=5.0, relaxed=True)
        assert whole.chosen is not None
        cost_ns = sum(choices[0][i].cost_ns for i in whole.chosen)
        assert parts.bound_ns <= whole.bound_ns <= cost_ns
        assert set(whole.used[0]) == set(whole.chosen)
        assert parts.used[0] <= set(range(len(SCHEDULES)))
        dearer += parts.bound_ns < whole.bound_ns
    assert dearer


def test_a_point_saves_no_more_than_its_limit() -> None:
    """Of 16 bytes that can be saved: all, a alone, b alone, nothing."""
    (ps,) = _points(_step(1))
    found = [ps.solve(limit, time_limit_s=2.0, gap=0.0).point for limit in (16, 10, 6, 0)]
    assert [None if p is None else (p.saved_bytes, p.cost_ns) for p in found] == [
        (16, 33),
        (6, 36),
        (6, 36),
        (0, 41),
    ]


def test_the_least_memory_fits_and_nothing_enumerated_is_lower() -> None:
    """The lowest peak of all choices of three blocks."""
    step = _step(3)
    chosen, peak_bytes = least_memory_of_blocks(step, _points(step), time_limit_s=3.0)
    assert replay(step.whole, step.schedule(chosen)).peak_bytes == peak_bytes
    lowest = min(
        replay(step.whole, step.schedule(dict(zip(step.paths, picked, strict=True)))).peak_bytes
        for picked in product(SCHEDULES, repeat=3)
    )
    assert peak_bytes <= lowest


def test_below_the_least_memory_there_is_no_schedule() -> None:
    """A budget of one byte less than what is resident."""
    step = _step(2)
    result = solve_blocks(step, _points(step), 3, time_limit_s=1.0)
    assert result.chosen is None


def test_without_time_the_bound_is_that_every_operator_runs() -> None:
    """And not nothing at all, which would look like a proof."""
    step = _step(2)
    result = solve_blocks(step, _points(step), 3, time_limit_s=0.0)
    assert result.chosen is None
    assert result.lower_bound_ns == step.whole.base_cost_ns


def test_a_block_of_another_size_is_refused() -> None:
    """An output that has 4 bytes in the step cannot have 5 in its block."""
    step = _step(1)
    block = step.blocks[0]
    storages = list(block.graph.storages)
    storages[Y] = Storage(name="y", size_bytes=5, producer=2)
    other = Block(graph=CostGraph(block.graph.operators, tuple(storages)), turn=3)
    with pytest.raises(ValueError, match=r"'y' of 'layers\.0' has 5 bytes in its block and 4"):
        BlockedStep(step.rest, (other,), step.calls)
