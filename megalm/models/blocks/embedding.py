"""Tokens into the residual stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megalm.models.blocks.arrangement import Kernels, Spread
from megalm.models.blocks.norm import LayerNorm
from megalm.models.blocks.positions import PositionTable
from megalm.parallel.embedding import VocabParallelEmbedding


class WordEmbedding(VocabParallelEmbedding):
    """The word embedding and the LayerNorm right after it, which checkpoint files keep as `word_embeddings.norm`.

    Shapes: tokens [s, b] -> [s, b, h] ([s/t, b, h] with sequence parallelism).
    """

    def __init__(
        self, vocab_rows: int, hidden_size: int, *, norm_epsilon: float | None, kernels: Kernels, spread: Spread
    ) -> None:
        super().__init__(vocab_rows, hidden_size, tp=spread.tp, sequence_parallel=spread.splits_sequence)
        self.norm = (
            None
            if norm_epsilon is None
            else LayerNorm(hidden_size, epsilon=norm_epsilon, kernels=kernels, spread=spread)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x if self.norm is None else self.norm(x)


class GPTEmbedding(nn.Module):
    """Word embedding, learned positions if any, dropout.

    Shapes: tokens [s, b], positions [s, 1] or [s, b] -> [s, b, h] ([s/t, b, h] with sequence parallelism).
    """

    def __init__(
        self,
        vocab_rows: int,
        hidden_size: int,
        *,
        num_positions: int | None,
        norm_epsilon: float | None,
        dropout: float,
        kernels: Kernels,
        spread: Spread,
    ) -> None:
        super().__init__()
        self.spread = spread
        self.dropout = dropout
        self.word_embeddings = WordEmbedding(
            vocab_rows, hidden_size, norm_epsilon=norm_epsilon, kernels=kernels, spread=spread
        )
        self.position_embeddings = (
            None
            if num_positions is None
            else PositionTable(num_positions, hidden_size, tp=spread.tp, sequence_parallel=spread.splits_sequence)
        )

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.word_embeddings(tokens)  # [s, b] -> [s, b, h]
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions)
        with self.spread.hidden_stream(self.training and self.dropout > 0.0):
            return F.dropout(x, p=self.dropout, training=self.training)
