"""GELU by tanh without a bias, under the names that BLOOM's documentation uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


# TorchScript reads no module constants, hence the literal sqrt(2 / pi) in the two functions below.
def tanh_gelu(x: Tensor) -> Tensor:
    """The formula in the dtype of `x`; the callers choose that dtype."""
    inner = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    return 0.5 * x * (1.0 + torch.tanh(inner))


def tanh_gelu_slope(x: Tensor) -> Tensor:
    """The derivative of `tanh_gelu`, in the dtype of `x`."""
    tanh = torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x))
    inner_slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner_slope


def bloom_gelu_forward(x: Tensor) -> Tensor:
    """GELU by tanh, in fp32 inside, rounded once to the dtype of `x`."""
    return tanh_gelu(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def bloom_gelu_back(g: Tensor, x: Tensor) -> Tensor:
    """Gradient of `bloom_gelu_forward` at the tensor `x`, times the incoming gradient `g`."""
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    return (tanh_gelu_slope(x.to(wide_dtype)) * g.to(wide_dtype)).to(x.dtype)


class GeLUFunction(torch.autograd.Function):
    """`bloom_gelu_forward` with `bloom_gelu_back` as its backward; keeps nothing but the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return bloom_gelu_forward(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return bloom_gelu_back(grad_outputs[0], x)


class BloomGelu(nn.Module):
    """BLOOM's activation as a module. Shapes: [...] -> [...]."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = GeLUFunction.apply(x)
        return result


def new_gelu(x: Tensor) -> Tensor:
    """`BloomGelu` as a function, under the name that GPT-2 gave the formula."""
    result: Tensor = GeLUFunction.apply(x)
    return result
