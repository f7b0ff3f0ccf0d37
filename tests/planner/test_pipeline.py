"""Two stages of a pipeline, each by a plan of its own: equal bits, and each within its budget."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors
from planner import Plan, PlanWarning, applied_plan, optimize, plan_pipeline
from planner.base.resident import storage_bytes
from planner.measuring.measure import record_peak
from tests.ranks import spawn_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed"),
]

WIDTH, ROWS, MICROBATCHES, STAGES = 64, 512, 4, 2


class Stage(nn.Module):
    """Residual layers with dropout."""

    def __init__(self, seed: int, num_layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH)
            )
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def _batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(MICROBATCHES * ROWS, WIDTH, generator=generator)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


@dataclass
class Found:
    """What one stage saw of one way to train."""

    gradients: dict[str, Tensor]
    peak_bytes: int
    budget_bytes: int | None = None


def calls_in_flight(schedule: str, rank: int) -> int:
    """Micro-batches whose forward pass a stage has run, and not their backward pass."""
    return MICROBATCHES if schedule == "ScheduleGPipe" else STAGES - rank


def held_by_the_schedule(schedule: str, rank: int) -> int:
    """Bytes beside the stage's calls in flight: tensors received, outputs kept, the loss."""
    if rank == 0:
        return 0
    num_bytes = _batch(0).nbytes // MICROBATCHES
    others = MICROBATCHES - calls_in_flight(schedule, rank)
    of_the_loss = 3  # difference, square, and the gradient between them
    return (2 * others + of_the_loss) * num_bytes


def plan_for(stage: Stage, rank: int, schedule: str, **budget: Any) -> Plan:
    """Plan a stage with its calls in flight."""
    return optimize(
        stage,
        torch.zeros(ROWS, WIDTH, requires_grad=True) if rank else _batch(0)[:ROWS],
        grads="accumulated",
        concurrent_calls=calls_in_flight(schedule, rank),
        resident_bytes=held_by_the_schedule(schedule, rank),
        time_limit_s=2,
        gap=0.05,
        **budget,
    )


def train(rank: int, schedule: str, stage: Stage, plan: Plan | None) -> Found:
    """Two steps of a stage, of which the second is recorded."""
    from torch.distributed import pipelining

    cpu, budget_bytes = torch.device("cpu"), None
    if plan is not None:
        plan.apply(stage)
        budget_bytes = plan.budget_bytes
    run = getattr(pipelining, schedule)(
        pipelining.PipelineStage(stage, rank, STAGES, cpu),
        n_microbatches=MICROBATCHES,
        loss_fn=_loss,
    )

    def step() -> None:
        torch.manual_seed(rank)
        stage.zero_grad(set_to_none=False)
        if rank:
            run.step(target=_batch(1))
        else:
            run.step(_batch(0))

    step()
    gradients = [p.grad for p in stage.parameters() if p.grad is not None]
    there = [*stage.parameters(), *gradients]
    there_bytes = storage_bytes(there, cpu)
    peak_bytes = there_bytes + record_peak(step, cpu, there)[0]
    found = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
    applied = applied_plan(stage)
    assert applied is None or applied.unplanned_steps == 0
    return Found(gradients=found, peak_bytes=peak_bytes, budget_bytes=budget_bytes)


def train_divided(rank: int, folder: Path) -> list[Found]:
    """Let the first process divide the layers under one budget, and all train so under 1F1B."""
    budget_bytes = 3_350_000  # the least for three layers of the first stage is 3,249,544
    if rank == 0:
        made = plan_pipeline(
            lambda stage: plan_for(
                Stage(stage.index, stage.end - stage.first),
                stage.index,
                "Schedule1F1B",
                budget_bytes=budget_bytes,
            ),
            num_layers=6,
            num_stages=STAGES,
            num_microbatches=MICROBATCHES,
            alike=True,
        )
        for index, planned in enumerate(made.stages):
            planned.plan.save(folder / f"stage{index}.json")
        torch.save([s.stage.end - s.stage.first for s in made.stages], folder / "layers.pt")
    dist.barrier()
    num_layers = torch.load(folder / "layers.pt")[rank]
    plan = Plan.load(folder / f"stage{rank}.json")
    return [train(rank, "Schedule1F1B", Stage(rank, num_layers), p) for p in (None, plan)]


def work(rank: int, folder: str) -> None:
    """Train one stage in each way, and write down what was seen."""
    warnings.simplefilter("error", PlanWarning)  # one call more in flight than planned, too
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=STAGES)
    found = {}
    for schedule in ("ScheduleGPipe", "Schedule1F1B"):
        plan = plan_for(Stage(rank), rank, schedule, budget="85%")
        found[schedule] = [train(rank, schedule, Stage(rank), p) for p in (None, plan)]
    found["divided"] = train_divided(rank, Path(folder))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Found]]]:
    """What each of the two saw, by schedule: without a plan, and by one."""
    folder = tmp_path_factory.mktemp("pipeline")
    spawn_ranks(work, (str(folder),), nprocs=STAGES)
    return [_read(folder / f"rank{rank}.pt") for rank in range(STAGES)]


def _read(path: Path) -> dict[str, list[Found]]:
    found: dict[str, list[Found]] = torch.load(path, weights_only=False)
    return found


@pytest.mark.parametrize("rank", range(STAGES))
@pytest.mark.parametrize("schedule", ["ScheduleGPipe", "Schedule1F1B", "divided"])
def test_a_stage_has_eagers_bits(
    stages: list[dict[str, list[Found]]], schedule: str, rank: int
) -> None:
    """Of all gradients, over four micro-batches with dropout."""
    eager, planned = stages[rank][schedule]
    assert_same_tensors(eager.gradients, planned.gradients)


@pytest.mark.parametrize("rank", range(STAGES))
@pytest.mark.parametrize("schedule", ["ScheduleGPipe", "Schedule1F1B", "divided"])
def test_a_stage_stays_within_its_budget(
    stages: list[dict[str, list[Found]]], schedule: str, rank: int
) -> None:
    """With all micro-batches in flight, and below what it takes without a plan."""
    eager, planned = stages[rank][schedule]
    assert planned.budget_bytes is not None
    assert planned.peak_bytes <= planned.budget_bytes
    assert planned.peak_bytes < eager.peak_bytes
