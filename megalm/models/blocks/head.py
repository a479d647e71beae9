"""From the residual stream to logits over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm.kernels.linear.protocol import LinearKernel
from megalm.models.blocks.arrangement import Kernels, Spread
from megalm.parallel.embedding import VocabParallelEmbedding
from megalm.parallel.linear import linear
from megalm.parallel.shard import mark_sharded, shard_size


def vocabulary_logits(x: Tensor, weight: Tensor, *, kernel: LinearKernel, spread: Spread) -> Tensor:
    """Logits of this rank's part of the vocabulary.

    Shapes: x [s, b, h] ([s/t, b, h] with sequence parallelism), weight [v/t, h] -> [s, b, v/t].
    Communicates: an all-reduce of x's gradient over tp; with sequence parallelism, an all-gather and a reduce-scatter.
    """
    return linear(x, weight, None, kernel=kernel, tp=spread.tp, sequence_parallel=spread.splits_sequence)


class OutputEmbedding(nn.Module):
    """A head with a weight of its own."""

    def __init__(self, vocab_rows: int, hidden_size: int, *, kernels: Kernels, spread: Spread) -> None:
        super().__init__()
        self.kernel = kernels.head_linear
        self.spread = spread
        local = shard_size(vocab_rows, spread.tp, what="rows of the output embedding")
        self.weight = mark_sharded(nn.Parameter(torch.empty(local, hidden_size)), dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return vocabulary_logits(x, self.weight, kernel=self.kernel, spread=self.spread)


class TiedEmbeddingHead(nn.Module):
    """The last stage's copy of the word embedding, which DeepSpeed keeps equal to the first stage's.

    It holds the weight alone, under the name that it has in the embedding: a copy of the embedding's norm and positions
    would be a parameter without a gradient.
    """

    def __init__(self, vocab_rows: int, hidden_size: int, *, kernels: Kernels, spread: Spread) -> None:
        super().__init__()
        self.kernel = kernels.head_linear
        self.word_embeddings = VocabParallelEmbedding(vocab_rows, hidden_size, tp=spread.tp)
