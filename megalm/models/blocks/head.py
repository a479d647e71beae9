"""From the residual stream to logits over the vocabulary, or at once to the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalm.kernels.cross_entropy.protocol import VocabularyRows
from megalm.kernels.linear.protocol import LinearKernel
from megalm.models.blocks.arrangement import Kernels, Spread
from megalm.parallel.collectives import copy_to, gather_sequence
from megalm.parallel.embedding import VocabParallelEmbedding
from megalm.parallel.gradient_sum import mark_adding
from megalm.parallel.head_loss import head_cross_entropy
from megalm.parallel.linear import linear
from megalm.parallel.shard import mark_sharded, shard_size


def vocabulary_logits(x: Tensor, weight: Tensor, *, kernel: LinearKernel, spread: Spread) -> Tensor:
    """Logits of this rank's part of the vocabulary.

    Shapes: x [s, b, h] ([s/t, b, h] with sequence parallelism), weight [v/t, h] -> [s, b, v/t].
    Communicates: an all-reduce of x's gradient over tp; with sequence parallelism, an all-gather and a reduce-scatter.
    """
    return linear(x, weight, None, kernel=kernel, tp=spread.tp, sequence_parallel=spread.splits_sequence)


class HeadInput(NamedTuple):
    """What the head multiplies, for a loss that does so itself: x [s, b, h], weight [v/t, h]."""

    x: Tensor
    weight: Tensor

    @classmethod
    def leaving_stage(cls, x: Tensor, weight: nn.Parameter) -> HeadInput:
        """As the output of an engine's module, whose gradients a loss outside computes.

        DeepSpeed (0.19) clears gradients in a hook on the outputs that have a history. The parameter itself has none:
        its gradient, which comes first, would be cleared by the hook on x.
        """
        return cls(x, weight.view_as(weight))


def head_loss(
    head: HeadInput,
    labels: Tensor,
    token_weights: Tensor,
    *,
    rows: VocabularyRows,
    kernel: LinearKernel,
    spread: Spread,
    z_loss: float,
) -> Tensor:
    """The weighted sum of the tokens' losses, without the logits of all of them in memory.

    Shapes: head.x [s, b, h] ([s/t, b, h] with sequence parallelism), labels, token_weights [s, b] -> scalar fp32.
    Communicates: as `head_cross_entropy`; and as `vocabulary_logits`.
    """
    x = gather_sequence(head.x, spread.tp) if spread.splits_sequence else copy_to(head.x, spread.tp)
    return head_cross_entropy(
        x, head.weight, labels, token_weights, tp=spread.tp, rows=rows, kernel=kernel, z_loss=z_loss
    )


class OutputEmbedding(nn.Module):
    """A head with a weight of its own. With kernels that fuse the loss it hands on what the loss multiplies.

    Shapes: x [s, b, h] -> logits [s, b, v/t], or `HeadInput`.
    """

    def __init__(self, vocab_rows: int, hidden_size: int, *, kernels: Kernels, spread: Spread) -> None:
        super().__init__()
        self.kernel = kernels.head_linear
        self.fuses_loss = kernels.head is not None
        self.spread = spread
        local = shard_size(vocab_rows, spread.tp, what="rows of the output embedding")
        self.weight = mark_adding(mark_sharded(nn.Parameter(torch.empty(local, hidden_size)), dim=0))

    def forward(self, x: Tensor) -> Tensor | HeadInput:
        if self.fuses_loss:
            return HeadInput.leaving_stage(x, self.weight)
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
