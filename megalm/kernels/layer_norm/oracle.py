"""LayerNorm written out: the specification that every faster implementation is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in fp32, rounded once to the dtype of `x`.

    float64 input stays float64, so that derivatives can be checked.

    Shapes: x [..., h], weight [h], bias [h] -> [..., h].
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(wide_dtype)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    normalised = centred * torch.rsqrt(variance + eps)
    return (normalised * weight.to(wide_dtype) + bias.to(wide_dtype)).to(x.dtype)
