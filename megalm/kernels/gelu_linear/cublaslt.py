"""The GELU inside the matrix products, as epilogues of cuBLASLt: no pass of its own over [T, 4h], forward or backward.

Separate kernels read [T, 4h] once and write it once more forward, and read it twice and write it twice backward, which
is what these save but for one writing and one reading that hide behind the product. What is rounded differs: u is not
rounded before the GELU that forward takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megalm.kernels.gelu_linear.cublaslt_library import (
    ALIGNMENT,
    DGELU,
    DGELU_BGRAD,
    GELU_AUX_BIAS,
    Host,
    Product,
    Shape,
    TorchHost,
    loaded_library,
)
from megalm.kernels.gelu_linear.oracle import TorchGeluLinear


class CublasLtGeluLinear:
    """A `GeluLinearKernel` in 16 bits on NVIDIA GPUs; sizes that are no multiples of 8 use torch's kernels.

    `host` gives the library and the stream when they are first needed. For measuring, `choice` takes a later suggestion
    of cuBLASLt's heuristic, and without `sums_bias` the bias's gradient is a pass of its own.
    """

    name = "cublaslt"

    def __init__(self, host: Callable[[], Host] = TorchHost, *, choice: int = 0, sums_bias: bool = True) -> None:
        self._host = functools.cache(host)
        self._sums_bias = sums_bias
        self._choice = choice
        self._products: dict[tuple[Shape, torch.device], Product] = {}
        self._reference = TorchGeluLinear()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        rows, f = x.flatten(0, -2), weight.size(0)
        if not _fits(rows, weight):
            return self._reference.forward(x, weight, bias)
        y, inner = (x.new_empty((*x.shape[:-1], f)) for _ in range(2))
        # Rows of ours are columns of cuBLAS's: y^T [f, T] = W x^T, and W lies as its own transpose.
        shape = Shape(f, rows.size(0), rows.size(1), transposes_a=True, epilogue=GELU_AUX_BIAS, dtype=x.dtype)
        self._product(shape, x.device)(_aligned(weight), _aligned(rows), y, inner, _aligned(bias.to(x.dtype)))
        return y, inner

    def backward(self, grad: Tensor, weight: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        rows, f = grad.flatten(0, -2), weight.size(1)
        if not _fits(rows, weight):
            return self._reference.backward(grad, weight, inner)
        gradient, bias = torch.empty_like(inner, memory_format=torch.contiguous_format), inner.new_empty(f)
        epilogue = DGELU_BGRAD if self._sums_bias else DGELU
        shape = Shape(f, rows.size(0), rows.size(1), transposes_a=False, epilogue=epilogue, dtype=grad.dtype)
        self._product(shape, grad.device)(_aligned(weight), _aligned(rows), gradient, _aligned(inner), bias)
        return gradient, bias if self._sums_bias else gradient.flatten(0, -2).sum(0)

    def _product(self, shape: Shape, device: torch.device) -> Product:
        key = (shape, device)
        if key not in self._products:
            self._products[key] = Product(self._host(), shape, choice=self._choice)
        return self._products[key]


def obstacle(device: torch.device) -> str | None:
    """Why cuBLASLt cannot be called on `device`, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "cuBLASLt is for NVIDIA GPUs"
    try:
        loaded_library()
    except OSError as failure:
        return f"cuBLASLt was not found ({failure})"
    return None


def _fits(rows: Tensor, weight: Tensor) -> bool:
    half = rows.dtype in (torch.bfloat16, torch.float16) and weight.dtype == rows.dtype
    multiple = ALIGNMENT // rows.element_size()
    return half and rows.numel() > 0 and weight.size(0) % multiple == 0 and weight.size(1) % multiple == 0


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()
