"""The products of a linear layer in fp32 for operands of 16 bits, rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class Fp32Linear:
    """A `LinearKernel` over torch's default BLAS that multiplies in fp32 at least."""

    name = "fp32"

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide_bias = None if bias is None else _wide(bias)
        return functional.linear(_wide(x), _wide(weight), wide_bias).to(x.dtype)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return (_wide(grad) @ _wide(weight)).to(grad.dtype)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        return (_wide(grad.flatten(0, -2)).t() @ _wide(x.flatten(0, -2))).to(grad.dtype)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
