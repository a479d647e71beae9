"""LayerNorm by torch's own kernel, which keeps its statistics in fp32 for every dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The oracle's result from `torch.nn.functional.layer_norm`.

    Torch wants one dtype for all three operands on a GPU. Operands of mixed dtypes are widened, never narrowed:
    fp32 weights beside a bf16 stream keep their bits.

    Shapes: x [..., h], weight [h], bias [h] -> [..., h].
    """
    if x.dtype == weight.dtype == bias.dtype:
        return functional.layer_norm(x, weight.shape, weight, bias, eps)
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    wide = functional.layer_norm(x.to(wide_dtype), weight.shape, weight.to(wide_dtype), bias.to(wide_dtype), eps)
    return wide.to(x.dtype)
