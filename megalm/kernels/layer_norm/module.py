"""The LayerNorm module of the transformer block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm.kernels.layer_norm import oracle
from megalm.kernels.layer_norm.protocol import LayerNormKernel


class MixedFusedLayerNorm(nn.Module):
    """LayerNorm over the last dimension: fp32 arithmetic, result in the dtype of the input.

    Shapes: [..., h] -> [..., h].
    """

    def __init__(
        self, hidden_size: int, *, eps: float = 1e-5, implementation: LayerNormKernel = oracle.layer_norm
    ) -> None:
        super().__init__()
        self.eps = eps
        self.implementation = implementation
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.implementation(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
