"""The plain peer: a GPT in ordinary torch, made to be as fast as plain torch gets.

Learned positions, tied head, fused qkv, scaled_dot_product_attention (flash), GELU, torch.compile over the whole model
with the loss inside, fused AdamW, weights and moments in the training dtype. No fp32 masters, no ALiBi, no embedding
LayerNorm: it does less than the trainer it is held against. On a CPU without a C++ compiler it runs uncompiled, under a
name that says so.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stepping import Shape, read_shape, train


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h = shape.hidden_size
        self.num_heads = shape.num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.dense = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.wide, self.narrow = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        parts = self.qkv(self.norm_1(x)).view(b, s, 3, self.num_heads, h // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)  # -> 3 of [b, n, s, d]
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dense(context.transpose(1, 2).reshape(b, s, h))
        return x + self.narrow(F.gelu(self.wide(self.norm_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """Tokens and labels in, mean loss out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h = shape.hidden_size
        self.tokens = nn.Embedding(shape.vocab_rows, h)
        self.positions = nn.Embedding(shape.seq_length, h)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(h)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


def main() -> None:
    shape = read_shape()
    with torch.device(shape.device):
        model = PlainGPT(shape).to(shape.torch_dtype)
    forward, side = model, "plain-compile"
    if shape.device == "cuda" or shutil.which("g++"):
        forward = torch.compile(model)
    else:
        side = "plain, uncompiled for want of g++"
    train(shape, list(model.parameters()), forward, fused=True, side=side)


if __name__ == "__main__":
    main()
