"""ALiBi: attention's linear bias on distance, in the forms that BLOOM and its Hugging Face port define."""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """The slope of every head, on the CPU.

    For p heads, p a power of two, head i has 2^(-8 (i+1) / p). The heads beyond the largest power of two p below
    `num_heads` take every other slope of the series for 2p. Bit-equal to transformers' for 1 to 128 heads.

    Shapes: -> [n] fp32.
    Raises: ValueError if num_heads is not positive.
    Source: Press et al. 2021, arXiv:2108.12409.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads = {num_heads} must be positive")
    power = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric_series(power, torch.arange(1, power + 1, dtype=torch.int32))
    extra = 2 * torch.arange(num_heads - power, dtype=torch.int32) + 1
    return torch.cat([slopes, _geometric_series(2 * power, extra)])


def _geometric_series(num_heads: int, exponents: Tensor) -> Tensor:
    # The base is rounded to fp32 before it is raised, as BLOOM was trained with.
    base = torch.tensor(2.0 ** (-8.0 / num_heads), dtype=torch.float32)
    return torch.pow(base, exponents)


def alibi_bias(slopes: Tensor, num_positions: int) -> Tensor:
    """slope * (j - i) for query i and key j: 0 on the diagonal, negative before it.

    Equal to BLOOM's slope * j under the softmax, which forgets a constant per row, and exact near the diagonal at any
    length, where slope * j is rounded in units that grow with j.

    Shapes: slopes [n] -> [n, s, s] fp32, on the device of `slopes`.
    """
    positions = torch.arange(num_positions, dtype=torch.float32, device=slopes.device)
    distances = positions[None, :] - positions[:, None]  # [s, s]
    return slopes.float()[:, None, None] * distances


def build_alibi_tensor(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Hugging Face Bloom's bias: slope times the position among the tokens that the mask keeps, 0 where it keeps none.

    Padding on the left, on the right or inside does not count as distance.

    Shapes: attention_mask [b, s] of 0/1 or bool -> [b*n, 1, s].
    """
    batch_size, num_positions = attention_mask.shape
    kept = attention_mask.long()
    positions = (kept.cumsum(dim=-1) - 1) * kept  # [b, s]
    slopes = alibi_slopes(num_heads).to(attention_mask.device)
    bias = slopes[None, :, None] * positions[:, None, :]  # [b, n, s]
    return bias.reshape(batch_size * num_heads, 1, num_positions).to(dtype)
