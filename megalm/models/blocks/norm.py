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
        self.fused_with_addition = kernels.add_layer_norm
        self.beside_residual = kernels.layer_norm_and_pass
        self.spread = spread
        mark_replicated(self.weight)
        mark_replicated(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters_with_whole_gradients()
        return self.implementation(x, weight, bias, self.eps)

    def and_pass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normalisation of x, and x for the residual stream that goes on beside it."""
        if self.beside_residual is None:
            return self(x), x
        weight, bias = self._parameters_with_whole_gradients()
        return self.beside_residual(x, weight, bias, self.eps)

    def after_adding(self, x: Tensor, branch_bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """residual + (x + branch_bias), and its normalisation. Needs kernels that fuse the two."""
        assert self.fused_with_addition is not None, "these kernels have no add_layer_norm"
        weight, bias = self._parameters_with_whole_gradients()
        return self.fused_with_addition(x, branch_bias, residual, weight, bias, self.eps)

    def _parameters_with_whole_gradients(self) -> tuple[Tensor, ...]:
        if self.spread.splits_sequence:
            return sum_gradient_over(self.spread.tp, self.weight, self.bias)
        return self.weight, self.bias
