"""LayerNorm by torch's own kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The oracle's result from `torch.nn.functional.layer_norm`.

    Operands are widened, never narrowed, where torch would lose bits: beside weights of another dtype, which it does
    not take on a GPU, and in 16 bits on a CPU, where it keeps the statistics for the backward pass in 16 bits too.

    Shapes: x [..., h], weight [h], bias [h] -> [..., h].
    """
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    fp32_inside = x.dtype == wide_dtype or x.device.type != "cpu"
    if fp32_inside and x.dtype == weight.dtype == bias.dtype:
        return functional.layer_norm(x, weight.shape, weight, bias, eps)
    wide = functional.layer_norm(x.to(wide_dtype), weight.shape, weight.to(wide_dtype), bias.to(wide_dtype), eps)
    return wide.to(x.dtype)
