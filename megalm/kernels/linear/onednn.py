"""The products of a linear layer by oneDNN on a CPU.

torch gives fp32 products to MKL, which leaves half of the vector width of AMD's processors unused; oneDNN, which torch
carries too, writes its code for the processor it finds. On a Zen 5 core: 250 GFLOP/s against 112 (docs/performance.md).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class OneDnnLinear:
    """A `LinearKernel` for fp32 on CPUs; other dtypes and devices go to torch's own products."""

    name = "onednn"

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return _product(grad, weight.t(), None)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        columns, rows = grad.flatten(0, -2).t(), x.flatten(0, -2).t()  # [out, T], [in, T]
        # oneDNN is faster with the shorter side first, by a fifth at 128 x 384.
        if rows.size(0) < columns.size(0):
            return _product(rows, columns, None).t().contiguous()
        return _product(columns, rows, None)


def obstacle(device: torch.device) -> str | None:
    """Why oneDNN cannot serve `device`, or None."""
    if device.type != "cpu":
        return "oneDNN's products are for CPUs"
    return _missing()


def is_faster_here() -> bool:
    """Whether this is a CPU with 512-bit vectors that MKL does not use: any that is not Intel's."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "GenuineIntel" not in _vendor()


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b^T + bias over the last dimensions. Shapes: a [..., k], b [n, k], bias [n] -> [..., n]."""
    if a.numel() == 0 or b.numel() == 0 or a.dtype != torch.float32 or a.device.type != "cpu":
        return torch.nn.functional.linear(a, b, bias)
    product: Tensor = _operation()(a, b, bias, "none", [], "")
    return product


def _operation() -> Any:
    # What torch.compile's CPU code calls for the same purpose (torch 1.13 to 2.13). It has no public name.
    return torch.ops.mkldnn._linear_pointwise


@functools.cache
def _missing() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    try:
        a = torch.arange(6, dtype=torch.float32).view(2, 3)
        if not torch.equal(_operation()(a, a, None, "none", [], ""), a @ a.t()):
            return "oneDNN's product of small whole numbers is wrong"
    except (AttributeError, RuntimeError, TypeError) as failure:
        return f"this torch has no such operation ({str(failure).splitlines()[0]})"
    return None


@functools.cache
def _vendor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:2000]
    except OSError:
        return "GenuineIntel"  # unknown: torch's own choice stays
