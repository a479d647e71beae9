"""The products around a GELU and the GELU, one after the other: the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class TorchGeluLinear:
    """A `GeluLinearKernel` of torch's products and its GELU, which computes in fp32 and rounds once."""

    name = "torch"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        inner = functional.linear(x, weight, bias)
        return functional.gelu(inner, approximate="tanh"), inner

    def backward(self, grad: Tensor, weight: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(inner.dtype, torch.float32)
        gradient = torch.ops.aten.gelu_backward((grad @ weight).to(wide), inner.to(wide), approximate="tanh")
        return gradient.to(inner.dtype), gradient.flatten(0, -2).sum(0).to(inner.dtype)
