"""One pre-norm transformer block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from megalm.models.blocks.arrangement import BlockShape, Kernels, Spread
from megalm.models.blocks.attention import ParallelAttention
from megalm.models.blocks.mlp import ParallelMLP
from megalm.models.blocks.norm import LayerNorm
from megalm.parallel.recompute import recompute


class Addends(NamedTuple):
    """The residual stream before the last addition: residual + (branch + bias), which the next LayerNorm does on the
    way. Shapes: branch, residual [s, b, h], bias [h]."""

    branch: Tensor
    bias: Tensor
    residual: Tensor


class ParallelTransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    The class and attribute names are read from outside: stages are cut at class names that match `transformer`, and the
    attributes are the keys of checkpoint files.

    A block takes the stream or its `Addends`, and gives those where `leaves_addition` is set, by someone who knows that
    the next layer takes them.

    Shapes: x [s, b, h] -> [s, b, h] (both [s/t, b, h] with sequence parallelism); mask as `ParallelAttention` takes it.
    """

    def __init__(self, shape: BlockShape, *, kernels: Kernels, spread: Spread) -> None:
        super().__init__()
        self.spread = spread
        self.hidden_dropout = shape.hidden_dropout
        self.dropout_add = kernels.dropout_add
        self.drops = shape.hidden_dropout > 0.0 or shape.attention_dropout > 0.0
        epsilon = shape.layernorm_epsilon
        self.input_layernorm = LayerNorm(shape.hidden_size, epsilon=epsilon, kernels=kernels, spread=spread)
        self.self_attention = ParallelAttention(shape, kernels=kernels, spread=spread)
        self.post_attention_layernorm = LayerNorm(shape.hidden_size, epsilon=epsilon, kernels=kernels, spread=spread)
        self.mlp = ParallelMLP(shape, kernels=kernels, spread=spread)
        self.leaves_addition = False

    @property
    def can_leave_addition(self) -> bool:
        """Whether the block's last addition can be left to a LayerNorm after it, and gains from that."""
        fuses = self.input_layernorm.fused_with_addition is not None
        return fuses and self.hidden_dropout == 0.0 and self.spread.recompute != "full"

    def forward(self, x: Tensor | Addends, mask: Tensor | None = None) -> Tensor | Addends:
        if self.training and self.spread.recompute == "full":
            again: Tensor | Addends = recompute(self._compute, x, mask, draws=self.drops, streams=self.spread.streams)
            return again
        return self._compute(x, mask)

    def _compute(self, x: Tensor | Addends, mask: Tensor | None) -> Tensor | Addends:
        if isinstance(x, Addends):
            x, normed = self.input_layernorm.after_adding(*x)
        else:
            normed, x = self.input_layernorm.and_pass(x)
        attended = self.self_attention(normed, mask)
        x, normed = self._add_and_normalise(attended, self.self_attention.dense.added_bias(), x)
        addends = Addends(self.mlp(normed), self.mlp.dense_4h_to_h.added_bias(), x)
        return addends if self.leaves_addition else self._add(*addends)

    def _add_and_normalise(self, branch: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.post_attention_layernorm
        drops = self.training and self.hidden_dropout > 0.0
        if norm.fused_with_addition is not None and not drops:
            return norm.after_adding(branch, bias, residual)
        x = self._add(branch, bias, residual)
        return x, norm(x)

    def _add(self, branch: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        with self.spread.hidden_stream(self.training and self.hidden_dropout > 0.0):
            return self.dropout_add(branch, bias, residual, self.hidden_dropout, self.training)


def leave_additions(layers: Sequence[object]) -> None:
    """Let every block in `layers`, which run one after the other, leave its last addition to a block right after it."""
    for block, following in itertools.pairwise(layers):
        if isinstance(block, ParallelTransformerLayer) and isinstance(following, ParallelTransformerLayer):
            block.leaves_addition = block.can_leave_addition
