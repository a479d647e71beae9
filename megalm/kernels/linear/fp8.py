"""The products of a linear layer in 8-bit floating point.

Operands are scaled as a whole so that their largest element is the format's largest, rounded to 8 bits, and multiplied
with fp32 accumulation. Weights and activations take e4m3 (3 bits of mantissa), gradients e5m2 (2 bits, more range).
Scales are those of the tensor at hand, not of earlier steps, so that nothing is stored and resuming stays exact.
Source: Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What torch's scaled product asks of the sizes of a weight and of the number of tokens."""


class Fp8Linear:
    """A `LinearKernel` whose three products read 8-bit operands; sizes that are no multiples of 16 use `functional`."""

    def __init__(self, *, gradient_format: torch.dtype = E5M2) -> None:
        self.name = "fp8" if gradient_format == E5M2 else "fp8_e4m3"
        self._gradient_format = gradient_format

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.flatten(0, -2)
        if not _fits(rows, weight):
            return functional.linear(x, weight, bias)
        y = _scaled_product(_Scaled.of(rows, E4M3), _Scaled.of(weight, E4M3), out_dtype=x.dtype)
        y = y.view(*x.shape[:-1], weight.size(0))
        return y if bias is None else y + bias

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        rows = grad.flatten(0, -2)
        if not _fits(rows, weight):
            return grad @ weight
        dx = _scaled_product(
            _Scaled.of(rows, self._gradient_format), _Scaled.of(weight.t(), E4M3), out_dtype=grad.dtype
        )
        return dx.view(*grad.shape[:-1], weight.size(1))

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        columns, rows = grad.flatten(0, -2).t(), x.flatten(0, -2).t()  # [out, T], [in, T]
        if not _fits(columns, rows):
            return columns @ rows.t()
        return _scaled_product(_Scaled.of(columns, self._gradient_format), _Scaled.of(rows, E4M3), out_dtype=grad.dtype)


class _Scaled:
    """A tensor in 8 bits and the number that its elements were divided by."""

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values = values
        self.scale = scale

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype) -> _Scaled:
        largest = torch.finfo(dtype).max
        scale = x.abs().amax().float().clamp(min=1e-30) / largest
        # Rounding may step over the largest value, which 8-bit formats turn into NaN or infinity.
        return cls((x.float() / scale).clamp(-largest, largest).to(dtype).contiguous(), scale)


def obstacle(device: torch.device) -> str | None:
    """Why 8-bit products cannot run on `device`, or None. On CPUs they run for tests; they are no faster there."""
    if device.type != "cuda":
        return None
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (8, 9):
        return "8-bit products need compute capability 8.9 (Ada, Hopper) or newer"
    return None


def _scaled_product(a: _Scaled, b: _Scaled, *, out_dtype: torch.dtype) -> Tensor:
    """a b^T. Shapes: a [m, k], b [n, k] -> [m, n]."""
    # fp16 and fp32 results are asked for where the backend has them; cuBLAS's fast path writes bf16.
    direct = out_dtype if out_dtype in (torch.bfloat16, torch.float16) or not a.values.is_cuda else torch.bfloat16
    product: Tensor = torch._scaled_mm(
        a.values, b.values.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=direct, use_fast_accum=False
    )
    return product.to(out_dtype)


def _fits(a: Tensor, b: Tensor) -> bool:
    return all(size > 0 and size % MULTIPLE == 0 for size in (*a.shape, *b.shape))
