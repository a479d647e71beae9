"""Causal self-attention with heads cut over tensor-parallel ranks.

The letters of every shape in megalm: s sequence, b micro-batch, h hidden, n heads, d head size, f ffn, v padded
vocabulary, t = tp.size. Activations are [s, b, h]; under sequence parallelism they are [s/t, b, h] between
tensor-parallel layers.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from megalm.models.blocks.arrangement import BlockShape, Kernels, Spread
from megalm.models.blocks.positions import AlibiSlopes
from megalm.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalm.parallel.recompute import recompute
from megalm.parallel.shard import shard_size


class ParallelAttention(nn.Module):
    """query_key_value -> attention core -> dense, without dense's bias.

    query_key_value's features are (heads, 3, head size), so that tensor shards concatenate without a permutation.

    Shapes: x [s, b, h] -> [s, b, h] (both [s/t, b, h] with sequence parallelism); mask [b or 1, 1, s, s] bool,
        True = masked out, or [b, s] int, the first key that each query sees.
    """

    def __init__(self, shape: BlockShape, *, kernels: Kernels, spread: Spread) -> None:
        super().__init__()
        self.core = kernels.attention
        self.spread = spread
        self.dropout = shape.attention_dropout
        self.num_local_heads = shard_size(shape.num_heads, spread.tp, what="num_heads")
        self.head_size = shape.head_size
        self.query_key_value = ColumnParallelLinear(
            shape.hidden_size,
            3 * shape.hidden_size,
            tp=spread.tp,
            sequence_parallel=spread.splits_sequence,
            kernel=kernels.linear,
        )
        self.dense = RowParallelLinear(
            shape.hidden_size,
            shape.hidden_size,
            tp=spread.tp,
            sequence_parallel=spread.splits_sequence,
            skip_bias_add=True,
            kernel=kernels.linear,
        )
        self.alibi = AlibiSlopes(shape.num_heads, tp=spread.tp) if shape.alibi else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = self.query_key_value.added_bias() if self.core.sums_bias_gradient else None
        # [s, b, h] -> [s, b, 3h/t]
        mixed = self.query_key_value(x) if bias is None else self.query_key_value.with_bias(x, bias.detach())
        mixed = mixed.view(*mixed.shape[:2], self.num_local_heads, 3, self.head_size)  # -> [s, b, n/t, 3, d]
        context = self._attend(mixed, mask, bias)  # -> [s, b, h/t]
        projected: Tensor = self.dense(context)  # -> [s, b, h]
        return projected

    def _attend(self, mixed: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        attend = functools.partial(
            self.core.from_fused,
            bias=bias,
            slopes=None if self.alibi is None else self.alibi(),
            mask=mask,
            dropout=self.dropout,
            training=self.training,
        )
        draws = self.training and self.dropout > 0.0
        # Each rank drops weights of its own heads. In here the tensor-parallel stream is the default one, so that
        # recomputation has one state to restore.
        with self.spread.tensor_stream(draws):
            if self.training and self.spread.recompute == "selective":
                return recompute(attend, mixed, draws=draws)
            return attend(mixed)
