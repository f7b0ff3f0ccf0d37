"""Train with Transformers' Trainer at 60 % of the memory: one callback."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from planner.integrations.transformers import RematCallback


class Texts(Dataset):
    """Random tokens, where texts would be."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(512, (128,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def train(*callbacks: RematCallback, layers: int, num_steps: int) -> list[float]:
    torch.manual_seed(0)
    size = {"n_layer": layers, "n_embd": 128, "n_head": 4, "vocab_size": 512, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=num_steps, logging_steps=1, report_to=[], save_strategy="no"
        )
        trainer = Trainer(model, arguments, train_dataset=Texts(), callbacks=[*callbacks])
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(layers: int = 4, num_steps: int = 5, budget: str = "60%") -> None:
    remat = RematCallback(budget=budget, gap=0.01)
    losses = train(remat, layers=layers, num_steps=num_steps)
    print(remat.plan)
    print(remat.applied)
    print("losses equal to those without:", losses == train(layers=layers, num_steps=num_steps))


if __name__ == "__main__":
    main()
