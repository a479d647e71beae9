"""From the residual stream to logits over the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.models.blocks.arrangement import Spread
from megalm.parallel.collectives import copy_to, gather_sequence
from megalm.parallel.embedding import VocabParallelEmbedding
from megalm.parallel.shard import mark_sharded, shard_size


def vocabulary_logits(x: Tensor, weight: Tensor, *, spread: Spread) -> Tensor:
    """Logits of this rank's part of the vocabulary.

    Shapes: x [s, b, h] ([s/t, b, h] with sequence parallelism), weight [v/t, h] -> [s, b, v/t].
    Communicates: an all-reduce of x's gradient over tp; with sequence parallelism, an all-gather and a reduce-scatter.
    """
    x = gather_sequence(x, spread.tp) if spread.splits_sequence else copy_to(x, spread.tp)
    return F.linear(x, weight)


class OutputEmbedding(nn.Module):
    """A head with a weight of its own."""

    def __init__(self, vocab_rows: int, hidden_size: int, *, spread: Spread) -> None:
        super().__init__()
        self.spread = spread
        local = shard_size(vocab_rows, spread.tp, what="rows of the output embedding")
        self.weight = mark_sharded(nn.Parameter(torch.empty(local, hidden_size)), dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return vocabulary_logits(x, self.weight, spread=self.spread)


class TiedEmbeddingHead(nn.Module):
    """The last stage's copy of the word embedding, which DeepSpeed keeps equal to the first stage's.

    It holds the weight alone, under the name that it has in the embedding: a copy of the embedding's norm and positions
    would be a parameter without a gradient.
    """

    def __init__(self, vocab_rows: int, hidden_size: int, *, spread: Spread) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(vocab_rows, hidden_size, tp=spread.tp)
