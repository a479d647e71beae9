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


def add_layer_norm(
    x: Tensor, branch_bias: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual + (x + branch_bias) in fp32, rounded once, and the LayerNorm of what was rounded.

    Shapes: x, residual [..., h], branch_bias, weight, bias [h] -> 2 of [..., h].
    """
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    total = (residual.to(wide_dtype) + (x.to(wide_dtype) + branch_bias.to(wide_dtype))).to(residual.dtype)
    return total, layer_norm(total, weight, bias, eps)
