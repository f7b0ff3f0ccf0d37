"""Train by a plan: two lines in front of a loop that stays as it is."""

import torch
from torch import Tensor, nn

from planner import optimize


def build(width: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = [m for _ in range(8) for m in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))]
    return nn.Sequential(*blocks)


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def train(model: nn.Module, batches: list[Tensor]) -> list[float]:
    """A plain loop. It does not know of the plan."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(width: int = 256, rows: int = 4096, num_steps: int = 5, budget: str = "90MB") -> None:
    batches = [torch.randn(rows, width) for _ in range(num_steps)]
    model = build(width)
    plan = optimize(model, batches[0], budget_gb=budget, loss_fn=loss_of, optimizer="adamw")
    print(plan)
    losses = train(plan.apply(model), batches)
    print("losses by plan, equal to those without:", losses, losses == train(build(width), batches))


if __name__ == "__main__":
    main()
