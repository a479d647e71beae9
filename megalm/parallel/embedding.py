"""An embedding whose rows are cut over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm.parallel.collectives import reduce_from, reduce_scatter_sequence
from megalm.parallel.gradient_sum import lookup, mark_adding
from megalm.parallel.shard import mark_sharded, shard_size
from megalm.topology.group import Group


class VocabParallelEmbedding(nn.Module):
    """Rows of a table by id, with the table's rows cut over `tp`; with a group of one, nn.Embedding.

    Shapes: ids [s, b] -> [s, b, h] ([s/t, b, h] with sequence_parallel).
    Communicates: one all-reduce over tp, or with sequence_parallel one reduce-scatter.
    Raises: ConfigError if tp.size does not divide num_embeddings; IndexError (a device assertion on GPUs) on every
        rank for an id outside the table.
    """

    def __init__(self, num_embeddings: int, size: int, *, tp: Group, sequence_parallel: bool = False) -> None:
        super().__init__()
        local = shard_size(num_embeddings, tp, what="rows of the word embedding")
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.num_embeddings = num_embeddings
        self.weight = mark_adding(mark_sharded(nn.Parameter(torch.empty(local, size)), dim=0))

    def forward(self, ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return lookup(ids, self.weight)
        local, elsewhere = local_ids(ids, self.num_embeddings, tp=self.tp)
        x = lookup(local, self.weight, present=~elsewhere).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return reduce_scatter_sequence(x, self.tp) if self.sequence_parallel else reduce_from(x, self.tp)


def local_ids(ids: Tensor, num_embeddings: int, *, tp: Group) -> tuple[Tensor, Tensor]:
    """Ids relative to this rank's rows, and which of them belong to another rank (those become row 0).

    An id that no rank holds stays out of range, so that the lookup fails as nn.Embedding's does instead of
    contributing zeros on every rank.
    """
    size = num_embeddings // tp.size
    local = ids - tp.rank * size
    elsewhere = ((local < 0) | (local >= size)) & (ids >= 0) & (ids < num_embeddings)
    # A negative id must not wrap to a row of a later rank: local is then negative as well, hence out of range.
    return local.masked_fill(elsewhere, 0), elsewhere
