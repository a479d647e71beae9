"""What the products around a GELU promise, where the GELU belongs to them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class GeluLinearKernel(Protocol):
    """The two products of an MLP that touch its GELU: the one before it, forward, and the one after it, backward.

    `parallel.gelu_mlp` makes a differentiable MLP of them. Leading dimensions are free: T stands for all of them.
    """

    name: str

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """gelu_tanh(u) and u = x W^T + b, which backward needs.

        Shapes: x [T, in], weight [f, in], bias [f] -> 2 of [T, f] in the dtype of x.
        """
        ...

    def backward(self, grad: Tensor, weight: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of u, (grad W) gelu_tanh'(u), from that of the product after the GELU; and its sum over T,
        which is the bias's.

        Shapes: grad [T, out], weight [out, f], inner (u) [T, f] -> [T, f], [f].
        """
        ...
