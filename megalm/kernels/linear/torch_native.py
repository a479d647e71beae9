"""The products of a linear layer by torch's own matrix multiplication: the reference."""

from __future__ import annotations

import functools

import torch
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


def add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total += grad^T x. On NVIDIA GPUs cuBLAS adds as the product ends, in fp32: there is no gradient in 16 bits.

    Autograd does not count it as a change of `total`, so that backward of a later micro-batch may come after it.

    Shapes: total [out, in] fp32, grad [..., out], x [..., in].
    Source: what Megatron-LM calls gradient accumulation fusion.
    """
    columns, rows = grad.flatten(0, -2), x.flatten(0, -2)
    total = total.data  # the same memory with a count of its own
    if grad.dtype in (torch.bfloat16, torch.float16) and grad.is_cuda and _cublas_adds_in_fp32():
        # Transposed, as cuBLAS is faster at it: 789 us against 848 for 8,192 x 2,048 over 16,384 tokens on an H100.
        total = total.t()
        torch.addmm(total, rows.t(), columns, out_dtype=total.dtype, out=total)
    else:
        total.add_(columns.t() @ rows)


@functools.cache
def _cublas_adds_in_fp32() -> bool:
    return torch.version.cuda is not None and hasattr(torch.ops.aten.addmm, "dtype_out")


def linear_backward(total: Tensor, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """grad W, the gradient of a layer's input; on the way `add_weight_gradient`.

    An operation of torch.library, so that torch.compile keeps it in a block's graph. To torch it is one that changes
    nothing: told of `total`, it would copy the sum at every call, and refuse backward passes in another order than the
    forward passes'. Nothing else in a graph reads or writes a sum.

    Shapes: total [out, in] fp32, grad [..., out], x [..., in], weight [out, in] -> [..., in].
    """
    gradient: Tensor = torch.ops.megalm.linear_backward(total, grad, x, weight)
    return gradient


def _linear_backward(total: Tensor, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    add_weight_gradient(total, grad, x)
    return grad @ weight


_library = torch.library.Library("megalm", "FRAGMENT")
_library.define("linear_backward(Tensor total, Tensor grad, Tensor x, Tensor weight) -> Tensor")
_library.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("megalm::linear_backward")
def _(total: Tensor, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.size(1))
