"""A loop with accelerate, mixed precision and accumulation, at 60 % of the memory."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import planner


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def train(width: int, rows: int, budget: str | None) -> list[float]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    blocks = [m for _ in range(8) for m in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))]
    model = nn.Sequential(*blocks)
    optimizer = torch.optim.AdamW(model.parameters())
    if budget is not None:  # before prepare() or after it
        options = {"optimizer": optimizer, "grads": "accumulated", "gap": 0.01}
        watched = planner.watch(model, budget=budget, loss_fn=loss_of, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(4):
        x = torch.randn(rows, width)
        with accelerator.accumulate(model):
            loss = loss_of(model(x))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if budget is not None:
        print(watched.plan, planner.applied_plan(watched.model), sep="\n")
    return losses


def main(width: int = 256, rows: int = 4096, budget: str = "60%") -> None:
    losses = train(width, rows, budget)
    print("losses equal to those without:", losses == train(width, rows, None))


if __name__ == "__main__":
    main()
