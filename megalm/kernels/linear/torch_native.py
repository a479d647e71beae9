"""The products of a linear layer by torch's own matrix multiplication: the reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


class TorchLinear:
    """A `LinearKernel` over torch's default BLAS: cuBLAS on GPUs, MKL on CPUs."""

    name = "torch"

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad.flatten(0, -2).t() @ x.flatten(0, -2)
