"""LayerNorm on activations that may be split along the sequence."""

from __future__ import annotations

from torch import Tensor

from megalm.kernels.layer_norm.module import MixedFusedLayerNorm
from megalm.models.blocks.arrangement import Kernels, Spread
from megalm.parallel.replicated import sum_gradient_over
from megalm.parallel.shard import mark_replicated


class LayerNorm(MixedFusedLayerNorm):
    """MixedFusedLayerNorm, replicated over tp, with whole gradients under sequence parallelism.

    Shapes: [s, b, h] -> [s, b, h]; [s/t, b, h] -> [s/t, b, h] with sequence parallelism.
    Communicates: with sequence parallelism, one all-reduce of [2h] over tp in backward.
    """

    def __init__(self, hidden_size: int, *, epsilon: float, kernels: Kernels, spread: Spread) -> None:
        super().__init__(hidden_size, eps=epsilon, implementation=kernels.layer_norm)
        self.spread = spread
        mark_replicated(self.weight)
        mark_replicated(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if self.spread.splits_sequence:
            weight, bias = sum_gradient_over(self.spread.tp, weight, bias)
        return self.implementation(x, weight, bias, self.eps)
