"""What the matrix products of a linear layer promise."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LinearKernel(Protocol):
    """The three products of y = x W^T + b, apart from each other so that communication can run between them.

    `parallel.linear` makes one differentiable operation of them. Leading dimensions are free: T stands for all of them.
    """

    name: str

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shapes: x [T, in], weight [out, in], bias [out] -> [T, out] in the dtype of x."""
        ...

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Shapes: grad [T, out], weight [out, in] -> [T, in]."""
        ...

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Shapes: grad [T, out], x [T, in] -> [out, in]."""
        ...
