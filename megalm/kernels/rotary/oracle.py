"""Rotary position embedding written out: the specification of its faster form."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(num_positions: int, size: int, *, base: float = 10_000.0, device: torch.device) -> Tensor:
    """Position times base^(-2 i / size), in fp32 from float64.

    Shapes: -> [s, size / 2] fp32.
    Raises: ValueError if size is odd.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    if size % 2:
        raise ValueError(f"rotary embeddings turn pairs: size = {size} must be even")
    rates = base ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
    positions = torch.arange(num_positions, dtype=torch.float64, device=device)
    return torch.outer(positions, rates).float()


def rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Turn element i and element i + size / 2 of the first `size` elements of each head by angle i; the rest stays.

    The pairs are GPT-NeoX's and Llama's, halves of the head, not neighbours. fp32 inside, rounded once.

    Shapes: x [b, n, s, d], angles [s, size / 2] -> [b, n, s, d].
    """
    half = angles.size(-1)
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.to(wide_dtype).cos(), angles.to(wide_dtype).sin()
    first, second = x[..., :half].to(wide_dtype), x[..., half : 2 * half].to(wide_dtype)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)
