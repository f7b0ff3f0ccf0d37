"""Fine-tune LoRA adapters with TRL at 80 % of the memory: the same callback as for Trainer."""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from planner.integrations.transformers import RematCallback

WORDS = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *map(str, range(500))])}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def train(*callbacks: RematCallback, layers: int, num_steps: int) -> list[float]:
    torch.manual_seed(0)
    texts = [" ".join(str((i * k) % 500) for k in range(250)) for i in range(64)]
    size = {"n_layer": layers, "n_embd": 128, "n_head": 4, "vocab_size": len(WORDS)}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=1, pad_token_id=0))
    adapters = LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True)
    fixed = {"logging_steps": 1, "report_to": [], "save_strategy": "no", "bf16": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(folder, max_steps=num_steps, **fixed),
            train_dataset=Dataset.from_list([{"text": text} for text in texts]),
            processing_class=tokenizer(),
            peft_config=adapters,
            callbacks=[*callbacks],
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(layers: int = 4, num_steps: int = 5, budget: str = "80%") -> None:
    remat = RematCallback(budget=budget, gap=0.01)
    losses = train(remat, layers=layers, num_steps=num_steps)
    print(remat.plan, remat.applied, sep="\n")
    print("losses equal to those without:", losses == train(layers=layers, num_steps=num_steps))


if __name__ == "__main__":
    main()
