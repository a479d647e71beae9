"""The products around a GELU as operations of torch.library, so that torch.compile keeps them in a block's graph."""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.kernels.gelu_linear.cublaslt import CublasLtGeluLinear
from megalm.kernels.gelu_linear.oracle import TorchGeluLinear
from megalm.kernels.gelu_linear.protocol import GeluLinearKernel
from megalm.kernels.linear.torch_native import add_weight_gradient

BY_NAME: dict[str, GeluLinearKernel] = {kernel.name: kernel for kernel in (TorchGeluLinear(), CublasLtGeluLinear())}


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, *, kernel: str) -> tuple[Tensor, Tensor]:
    """`GeluLinearKernel.forward` of the kernel of that name; autograd does not look into it."""
    y, inner = torch.ops.megalm.gelu_linear(x, weight, bias, kernel)
    return y, inner


def gelu_linear_backward(
    total: Tensor | None, grad: Tensor, weight: Tensor, inner: Tensor, activated: Tensor, *, kernel: str
) -> tuple[Tensor, Tensor]:
    """`GeluLinearKernel.backward`; on the way `add_weight_gradient` of the product after the GELU, if there is a sum.

    To torch it changes nothing, as `linear_backward`. Shapes: total [out, f], activated [..., f].
    """
    gradient, bias = torch.ops.megalm.gelu_linear_backward(total, grad, weight, inner, activated, kernel)
    return gradient, bias


def _forward(x: Tensor, weight: Tensor, bias: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    return BY_NAME[kernel].forward(x, weight, bias)


def _backward(
    total: Tensor | None, grad: Tensor, weight: Tensor, inner: Tensor, activated: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    if total is not None:
        add_weight_gradient(total, grad, activated)
    return BY_NAME[kernel].backward(grad, weight, inner)


_library = torch.library.Library("megalm", "FRAGMENT")
_library.define("gelu_linear(Tensor x, Tensor weight, Tensor bias, str kernel) -> (Tensor, Tensor)")
_library.define(
    "gelu_linear_backward(Tensor? total, Tensor grad, Tensor weight, Tensor inner, Tensor activated, str kernel) "
    "-> (Tensor, Tensor)"
)
_library.impl("gelu_linear", _forward, "CompositeExplicitAutograd")
_library.impl("gelu_linear_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("megalm::gelu_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.size(0)))
    return y, torch.empty_like(y)


@torch.library.register_fake("megalm::gelu_linear_backward")
def _(
    total: Tensor | None, grad: Tensor, weight: Tensor, inner: Tensor, activated: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inner, memory_format=torch.contiguous_format), inner.new_empty(inner.size(-1))
