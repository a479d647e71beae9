"""What a bias-dropout-add implementation promises."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class BiasDropoutAddKernel(Protocol):
    """residual + dropout(x + bias). Random numbers come from the default generator of x's device, if any are needed.

    Shapes: x [..., h], bias [h], residual [..., h] -> [..., h].
    """

    def __call__(self, x: Tensor, bias: Tensor, residual: Tensor, prob: float, training: bool) -> Tensor: ...
