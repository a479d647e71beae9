"""The feed-forward half of a transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from megalm.models.blocks.arrangement import BlockShape, Kernels, Spread
from megalm.parallel.linear import ColumnParallelLinear, RowParallelLinear, gelu_mlp


class ParallelMLP(nn.Module):
    """dense_h_to_4h -> bias and GELU, or bias and gate -> dense_4h_to_h, without the last one's bias.

    A gated dense_h_to_4h has features in pairs (value, gate), so that tensor shards concatenate without a permutation.

    Shapes: x [s, b, h] -> [s, b, h] (both [s/t, b, h] with sequence parallelism).
    """

    def __init__(self, shape: BlockShape, *, kernels: Kernels, spread: Spread) -> None:
        super().__init__()
        self.bias_gelu = kernels.bias_gelu
        self.gelu_linear = kernels.gelu_linear
        self.recomputes_activation = spread.recompute == "activation"
        self.dense_h_to_4h = ColumnParallelLinear(
            shape.hidden_size,
            shape.ffn_inputs,
            tp=spread.tp,
            sequence_parallel=spread.splits_sequence,
            skip_bias_add=True,
            kernel=kernels.linear,
        )
        self.dense_4h_to_h = RowParallelLinear(
            shape.ffn_size,
            shape.hidden_size,
            tp=spread.tp,
            sequence_parallel=spread.splits_sequence,
            skip_bias_add=True,
            kernel=kernels.linear,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.gelu_linear is not None:
            up, down = self.dense_h_to_4h, self.dense_4h_to_h
            assert up.tp.size == 1, "the GELU inside the products is for one tensor-parallel rank"
            return gelu_mlp(x, up.weight, up.added_bias(), down.weight, kernel=self.gelu_linear)  # -> [s, b, h]
        wide, bias = self.dense_h_to_4h(x), self.dense_h_to_4h.added_bias()  # -> [s, b, f/t]
        if self.training and self.recomputes_activation:
            return self.dense_4h_to_h.after_activation(self.bias_gelu, wide, bias)  # -> [s, b, h]
        narrow: Tensor = self.dense_4h_to_h(self.bias_gelu(wide, bias))  # -> [s, b, h]
        return narrow
