"""How positions enter: ALiBi's slopes, a learned table, and where documents begin."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.kernels.alibi import alibi_slopes
from megalm.parallel.collectives import scatter_sequence
from megalm.parallel.shard import mark_replicated
from megalm.topology.group import Group


class AlibiSlopes(nn.Module):
    """This rank's slopes [n/t], in fp32 whatever the model is cast to.

    Not a buffer: DeepSpeed casts buffers with the model, and a slope rounded to bf16 is another slope.
    """

    def __init__(self, num_heads: int, *, tp: Group) -> None:
        super().__init__()
        local = num_heads // tp.size
        self.slopes = alibi_slopes(num_heads)[tp.rank * local : (tp.rank + 1) * local].clone()

    def forward(self) -> Tensor:
        return self.slopes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AlibiSlopes:
        super()._apply(fn, recurse)
        self.slopes = self.slopes.to(fn(self.slopes).device)
        return self


class PositionTable(nn.Module):
    """A learned vector for each position, replicated over tp.

    Shapes: positions [s, 1] or [s, b] -> [s, 1, h] or [s, b, h]; [s/t, ...] with sequence_parallel.
    """

    def __init__(self, num_positions: int, hidden_size: int, *, tp: Group, sequence_parallel: bool) -> None:
        super().__init__()
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.weight = mark_replicated(nn.Parameter(torch.empty(num_positions, hidden_size)))

    def forward(self, positions: Tensor) -> Tensor:
        x = F.embedding(positions, self.weight)
        # Every rank looks up all positions and keeps its part: backward gathers, so that the gradient is whole.
        return scatter_sequence(x, self.tp) if self.sequence_parallel else x


def absolute_positions(tokens: Tensor) -> Tensor:
    """0 to s - 1. Shapes: tokens [s, b] -> [s, 1]."""
    return torch.arange(tokens.size(0), device=tokens.device).unsqueeze(1)


def document_starts(tokens: Tensor, eod_id: int) -> Tensor:
    """Where the document of each token starts, which is the first key that the token sees.

    An end of document is the last token of its own. Shapes: tokens [s, b] -> [s, b] int64.
    """
    starts = torch.zeros_like(tokens)
    starts[1:] = torch.where(tokens[:-1] == eod_id, absolute_positions(tokens)[1:], 0)
    return starts.cummax(dim=0).values


def document_positions(tokens: Tensor, eod_id: int) -> Tensor:
    """Positions that start again with each document. Shapes: tokens [s, b] -> [s, b]."""
    return absolute_positions(tokens) - document_starts(tokens, eod_id)
