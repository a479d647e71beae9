"""The transformers peer: BloomForCausalLM of the same shape, weights in the training dtype, fused AdamW."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stepping import read_shape, train


def main() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    shape = read_shape()
    config = BloomConfig(
        vocab_size=shape.vocab_rows,
        hidden_size=shape.hidden_size,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        use_cache=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    with torch.device(shape.device):
        model = BloomForCausalLM(config).to(shape.torch_dtype)
    model.train()

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)).float(), labels.view(-1))

    train(shape, list(model.parameters()), loss_of, fused=True)


if __name__ == "__main__":
    main()
