"""Use the installed wheel, far from the checkout: plan, apply, train, save, load.

Not collected by pytest; `make test-wheel` runs it in a venv of its own.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import graph_capture
import planner
import solvers


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Linear(64, 64), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(64, 1)).train()


def loss_fn(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def main() -> None:
    for package in (planner, graph_capture, solvers):
        place = Path(package.__file__)
        assert place.is_relative_to(sys.prefix), (
            f"{package.__name__} comes from {place}, not the wheel"
        )
        assert (place.parent / "py.typed").exists(), f"{package.__name__} lacks py.typed"

    from planner import Plan, measure, optimize  # late: where they come from is checked first

    sample = torch.randn(512, 64)
    baseline = measure(build(), sample, loss_fn=loss_fn, repeats=1)
    budget_bytes = int(0.8 * baseline.peak_bytes)
    plan = optimize(build(), sample, budget_bytes=budget_bytes, loss_fn=loss_fn, time_limit_s=10)
    plan.save("plan.json")

    plain, planned = build(), Plan.load("plan.json").apply(build())
    for model in (plain, planned):
        loss_fn(model(sample)).backward()
    for p, q in zip(plain.parameters(), planned.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    measured = measure(planned, sample, loss_fn=loss_fn, repeats=1)
    assert measured.peak_bytes <= budget_bytes, (measured.peak_bytes, budget_bytes)
    sys.stdout.write(
        f"wheel {version('remat-planner')}: peak {measured.peak_bytes} of {budget_bytes} bytes, "
        f"{baseline.peak_bytes} without a plan\n"
    )


if __name__ == "__main__":
    main()
