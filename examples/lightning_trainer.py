"""Train with Lightning at 60 % of the memory: one callback."""

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from planner.integrations.lightning import RematCallback


class Regression(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [m for _ in range(8) for m in (nn.Linear(width, width), nn.GELU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def train(*callbacks: RematCallback, width: int, rows: int) -> list[float]:
    pl.seed_everything(0, verbose=False)
    module = Regression(width)
    data = TensorDataset(torch.randn(4 * rows, width), torch.randn(4 * rows, 1))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[*callbacks], **quiet)
    trainer.fit(module, DataLoader(data, batch_size=rows))
    return module.losses


def main(width: int = 256, rows: int = 4096, budget: str = "60%") -> None:
    remat = RematCallback(budget=budget, gap=0.01)
    losses = train(remat, width=width, rows=rows)
    print(remat.plan, remat.applied, sep="\n")
    print("losses equal to those without:", losses == train(width=width, rows=rows))


if __name__ == "__main__":
    main()
