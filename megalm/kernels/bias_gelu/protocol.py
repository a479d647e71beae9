"""What a bias-GELU implementation promises."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class BiasGeluKernel(Protocol):
    """gelu(x + bias): fp32 arithmetic inside, one rounding to the dtype of `x`, bias gradient summed in fp32.

    Shapes: x [..., f], bias [f] -> [..., f].
    """

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor: ...
