"""What a LayerNorm implementation promises."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LayerNormKernel(Protocol):
    """Normalises the last dimension in fp32, whatever the dtypes, and rounds once to the dtype of `x`.

    Shapes: x [..., h], weight [h], bias [h] -> [..., h].
    """

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor: ...


class AddLayerNormKernel(Protocol):
    """residual + (x + branch_bias), rounded once, and the LayerNorm of what was rounded.

    Shapes: x, residual [..., h], branch_bias, weight, bias [h] -> 2 of [..., h].
    """

    def __call__(
        self, x: Tensor, branch_bias: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...


class LayerNormAndPassKernel(Protocol):
    """The LayerNorm of x, and x: what goes on along the residual stream, whose gradient backward adds as it goes.

    Shapes: x [..., h], weight, bias [h] -> 2 of [..., h].
    """

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...
