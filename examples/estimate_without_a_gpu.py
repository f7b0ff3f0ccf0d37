"""Which batch fits an H100, asked on a machine that has none. Nothing is allocated."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from planner import estimate, max_batch


def main(num_layers: int = 4, sequence: int = 512, time_limit_s: float = 5) -> None:
    config = GPT2Config(
        n_layer=num_layers, n_positions=sequence, use_cache=False, loss_type="ForCausalLM"
    )
    with torch.device("meta"):  # shapes without weights
        model = GPT2LMHeadModel(config).train()
        tokens = torch.zeros(1, sequence, dtype=torch.long)
    step = {"input_ids": tokens, "labels": tokens}
    options = {"device": "h100", "autocast": torch.bfloat16, "optimizer": "adamw"}

    print(estimate(model, step, batch_sizes=(1, 16, 256), **options))
    print()
    print(max_batch(model, step, budget_gb=8, time_limit_s=time_limit_s, **options))


if __name__ == "__main__":
    main()
